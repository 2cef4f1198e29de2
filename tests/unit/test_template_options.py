"""What chat and batch make of a template before anything slow begins, and of what tokenizers and templates say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner

from tests.unit.fake_client import FakeClient, job_parser, write_tokenizer
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.cli import app as app_module
from tpctl.cli.app import app
from tpctl.cli.console import note, say
from tpctl.client.conversation import Conversation, recommended_sampling
from tpctl.client.jobs import BadLine, Line
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, RequestError, TpctlError, UsageError, printable
from tpctl.wire.settings import EngineConfig

THINKS = "{{ messages[-1].content }}{{ '+' if think else '-' }}{{ messages[-1].reasoning_content }}"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeClient]]:
    """The engines that the commands start on the model ``org/name``, without workers."""
    made: list[FakeClient] = []
    folder = write_tokenizer(tmp_path / "model")

    def prepare(model: str, options: object, policy: str = "fcfs", look: Any = None, **more: int) -> EngineConfig:
        look(ResolvedSource(folder, "org/name", None))
        return EngineConfig(folder, 1)

    def start(config: EngineConfig, **_: object) -> FakeClient:
        made.append(FakeClient(Tokenizer(write_tokenizer(tmp_path / "plain"))))
        return made[-1]

    monkeypatch.setattr("tpctl.client.engine_client.EngineClient", start)
    for module in ("chat", "batch"):
        monkeypatch.setattr(f"tpctl.cli.{module}.prepare", prepare)
    monkeypatch.chdir(tmp_path)
    yield made


def template(text: str | None) -> None:
    write_tokenizer(Path("model"), template=text)


def lines(*entries: object) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


MESSAGE = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        ("{% for %}", "chat -m hi", "the chat template org/name/tokenizer_config.json does not compile, line 1"),
        ("{{ 'a' * 4000000000 }}", "chat -m hi", "tokenizer_config.json took more than 512 MB"),
        ("{{ raise_exception('no ' + messages[-1].content) }}", "chat -m hi", "refuses these messages: no hi"),
        ("{{ raise_exception(messages[0].role) }}", "chat -m hi --system S", "refuses these messages: system"),
        ("{% for %}", "batch in.jsonl", "the chat template org/name/tokenizer_config.json does not compile, line 1"),
        ("{{ 'a' * 4000000000 }}", "batch in.jsonl", "tokenizer_config.json took more than 512 MB"),
        ("{{ a.b.c }}", "batch in.jsonl", "tokenizer_config.json fails on these messages: 'a' is undefined"),
        (None, "chat -m hi --chat-template-kwargs {}", "org/name has no chat template"),
        (None, 'chat -m hi --chat-template-kwargs {"a":1}', "are for a chat template, and org/name has none"),
        ("a", 'batch in.jsonl --chat-template-kwargs {"b":1}', "has 'b', which the chat template does not read"),
        (
            "a",
            'chat -m hi --chat-template-kwargs {"a":1,"a":2}',
            '--chat-template-kwargs: "a" occurs twice, as 1 and as 2',
        ),
        ("a", "chat -m hi --chat-template-kwargs [1]", "--chat-template-kwargs is [1], but must be a JSON object"),
        ("a", "chat -m hi --chat-template-kwargs {a}", '--chat-template-kwargs is "{a}", but must be a JSON object'),
        ("a", "chat -m hi --chat-template none.jinja", "none.jinja cannot be read: No such file or directory"),
        ("a", "chat -m hi --chat-template bad.jinja", "the chat template bad.jinja does not compile, line 2"),
    ],
)
def test_what_is_wrong_is_said_before_the_engine_starts(
    started: list[FakeClient], text: str | None, command: str, message: str
) -> None:
    template(text)
    lines(MESSAGE)
    Path("bad.jinja").write_text("a\n{% for %}")
    result = invoke(*command.split())
    assert isinstance(result.exception, TpctlError)
    assert message in str(result.exception)
    assert not started


def test_a_broken_template_is_no_matter_for_prompts(started: list[FakeClient]) -> None:
    template("{% for %}")
    lines({"prompt": "a"})
    assert invoke("batch", "in.jsonl").exit_code == 0
    lines({**MESSAGE, "chat_template_kwargs": {}}, {"prompt": "a"})  # the line may give what the template lacks
    result = invoke("batch", "in.jsonl")
    rows = [json.loads(row) for row in result.stdout.splitlines()]
    assert "line 1: the chat template org/name/tokenizer_config.json does not compile" in rows[0]["error"]
    assert rows[1]["text"] == "<a>"


def test_a_refusal_is_of_a_line_only(started: list[FakeClient]) -> None:
    template("{% if messages | length < 2 %}{{ raise_exception('two!') }}{% endif %}{{ messages[1].content }}")
    lines({"messages": MESSAGE["messages"] * 2}, MESSAGE)
    rows = [json.loads(row) for row in invoke("batch", "in.jsonl").stdout.splitlines()]
    assert rows[0]["text"] == "<hi>" and rows[1]["error"].endswith("refuses these messages: two!")


def test_a_template_of_one_s_own_and_its_variables(started: list[FakeClient]) -> None:
    Path("own.jinja").write_text(THINKS)
    options = ["--chat-template", "own.jinja", "--chat-template-kwargs", '{"think": true}']
    assert invoke("chat", "-m", "hi", *options).stdout == "<hi+>\n"
    assert invoke("chat", "-m", "hi", *options[:2]).stdout == "<hi->\n"
    thought = {"messages": [{"role": "user", "content": "hi", "thinking": "hm"}]}
    lines(thought, {**MESSAGE, "chat_template_kwargs": {"think": False}}, {**MESSAGE, "chat_template_kwargs": None})
    result = invoke("batch", "in.jsonl", *options)
    assert [json.loads(row)["text"] for row in result.stdout.splitlines()] == ["<hi+hm>", "<hi->", "<hi+>"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**MESSAGE, "chat_template_kwargs": 5}, "chat_template_kwargs is 5, but must be a JSON object"),
        ({**MESSAGE, "chat_template_kwargs": {"x": 1}}, "has 'x', which the chat template does not read"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, 'which are for "messages", with a "prompt"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'message 1 has a part of type "image_u'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'has a part {"type": "text"} in its content'),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, 'message 1 has the field "weight", which'),
        ({"messages": [{"role": "assistant", "content": None}]}, "must have a string as its content"),
    ],
)
def test_a_line_that_cannot_be_rendered(tmp_path: Path, entry: object, message: str) -> None:
    parser = job_parser(Tokenizer(write_tokenizer(tmp_path)))
    batch = [Line(n, n + 1, json.dumps(one).encode()) for n, one in enumerate([MESSAGE, entry])]
    parser.ahead(batch)
    first, second = map(parser.parse, batch)
    assert not isinstance(first, BadLine)
    assert (
        isinstance(second, BadLine)
        and second.message.startswith(("line 2: ", "line 2 has "))
        and message in second.message
    )


def test_resuming_needs_the_same_template(started: list[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    lines(MESSAGE, {"prompt": "longer than the other"})
    Path("own.jinja").write_text(THINKS)

    def run(*options: str, dies: int | None = None) -> Any:
        monkeypatch.setattr(FakeClient.__init__, "__kwdefaults__", {"max_model_len": 64, "dies_after": dies})
        return invoke("batch", "in.jsonl", "-o", "out.jsonl", *options)

    own = ["--chat-template", "own.jinja", "--chat-template-kwargs", '{"think": true}']
    assert "1 finished row is in out.jsonl.partial" in str(run(*own, dies=12).exception)
    for options, said in (
        (own[:2], '--chat-template-kwargs {"think": true} (now left out)'),
        (own[2:], "--chat-template own.jinja (SHA-256 "),
        ([], "--chat-template own.jinja (SHA-256 "),
    ):
        result = run("--resume", *options)
        assert isinstance(result.exception, UsageError) and said in str(result.exception)
    Path("own.jinja").write_text(THINKS + "!")
    assert "--chat-template own.jinja (SHA-256" in str(run("--resume", *own).exception)
    Path("own.jinja").write_text(THINKS)
    assert run("--resume", *own).exit_code == 0


def test_a_conversation_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    client: Any = FakeClient(tokenizer)

    def refused(conversation: Conversation) -> str:
        with pytest.raises(RequestError) as raised:
            conversation.ask("x" * 80, lambda piece: None)
        return str(raised.value)

    more = "but at most 63 leave room for an answer; {} or raise --max-model-len, or --kv-cache-memory if that is "
    more += "the limit"
    first = Conversation(client, tokenizer)
    adds = "tokens with what the chat template adds,"
    assert refused(first) == f"the message has 86 {adds} {more.format('shorten it,')}"
    first.ask("hi", lambda piece: None)
    assert refused(first) == f"the conversation has 104 {adds} {more.format('begin a new one with /reset,')}"
    with_system = Conversation(client, tokenizer, system="S")
    assert refused(with_system) == f"the system prompt and the message have 90 {adds} {more.format('shorten them,')}"


def test_a_generation_config_is_named_as_the_user_knows_it(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(CheckpointError, match=r"^org/name/generation_config\.json: top_p is 7"):
        recommended_sampling(tmp_path, shown="org/name")


def test_what_would_steer_a_terminal_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    wild = "\x1b]0;title\x07 \x9b2J a\tb\n\u202eabc ü中"
    tame = "\\x1b]0;title\\x07 \\x9b2J a\\tb\\n\\u202eabc ü中"
    assert printable(wild) == tame

    def fail() -> None:
        raise SourceError(wild)

    from tpctl.errors import SourceError

    note(wild)
    assert app_module._run(fail) == 1
    say(wild)
    captured = capsys.readouterr()
    lines = tame.replace("\\n", "\n")  # a note may have several, each of them tame
    assert captured.err == f"{lines}\ntpctl: {tame}\n" and captured.out == f"{tame}\n"


def slow(folder: Path) -> Path:
    """A tokenizer whose regex takes time that grows with the power of the text's length."""
    write_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(r"(a|aa)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_a_regex_beyond_its_limit_is_an_error_of_that_line(tmp_path: Path) -> None:
    parser = job_parser(Tokenizer(slow(tmp_path), shown="org/name"))
    texts = ["a" * 3000 + "b", "hello"]
    bad, good = (parser.parse(Line(n, n + 1, json.dumps({"prompt": t}).encode())) for n, t in enumerate(texts))
    assert isinstance(bad, BadLine) and not isinstance(good, BadLine)
    assert "line 1: org/name/tokenizer.json cannot turn this text into tokens: Onig: Regex search error" in bad.message


CODE = """
import sys
from pathlib import Path
from tpctl.cli.streams import take_streams
take_streams()
from tpctl.client.tokenizer import Tokenizer
try:
    Tokenizer(Path(sys.argv[1])).encode("a" * 3000 + "b")
except Exception as error:
    print(type(error).__name__, file=sys.stderr)
"""


def test_a_panic_prints_nothing_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(slow(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RUST_BACKTRACE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "RequestError\n")


@pytest.mark.parametrize("wild", ["[" * 3000, '{"model": {"type": "BPE"}}', "\x00", '{"version": "1.0", "model": 5}'])
def test_a_wild_tokenizer_is_one_line(tmp_path: Path, wild: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(wild)
    with pytest.raises(
        CheckpointError, match=r"^org/name/tokenizer\.json is not a tokenizer this version can read"
    ) as e:
        Tokenizer(tmp_path, shown="org/name")
    assert "\n" not in str(e.value)


def test_an_answer_that_cannot_be_decoded_is_an_error_of_its_line(
    started: list[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpctl.client import reasoning_stream

    real = reasoning_stream.detokenizer

    def failing(tokenizer: Tokenizer, prompt: list[int]) -> Any:
        if len(prompt) == 1:
            return real(tokenizer, prompt)

        class Fails:
            def push(self, id: int) -> str:
                raise CheckpointError("cannot decode")

        return Fails()

    monkeypatch.setattr(reasoning_stream, "detokenizer", failing)
    lines({"prompt": "ab"}, {"prompt": "c"})
    rows = [json.loads(row) for row in invoke("batch", "in.jsonl").stdout.splitlines()]
    assert rows[0] == {"id": 1, "error": "line 1: cannot decode"} and rows[1]["text"] == "<c>"
