"""Chat: turns, history, stopping an answer, and what the commands print where."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.fake_client import FakeClient, write_tokenizer
from tpctl.chat.repl import cut
from tpctl.cli import chat as chat_command
from tpctl.cli.app import app, main
from tpctl.cli.engine import engine_args, interrupts
from tpctl.cli.options import EngineOptions
from tpctl.client.conversation import CHAT_DEFAULTS, Conversation, recommended_sampling
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, EngineError, RequestError, TpctlError, UsageError
from tpctl.wire.messages import Output
from tpctl.wire.settings import EngineConfig


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "model"))


def begin(tokenizer: Tokenizer, **options: Any) -> tuple[Conversation, FakeClient, list[str]]:
    client: Any = FakeClient(tokenizer)
    return Conversation(client, tokenizer, **options), client, []


def test_the_whole_conversation_is_submitted_every_turn(tokenizer: Tokenizer) -> None:
    conversation, client, shown = begin(tokenizer, system="S")
    first = conversation.ask("hi", shown.append)
    assert first.text == "".join(shown) == "<[s]S[u]hi[a]>"
    assert (first.finish_reason, first.prompt_tokens, first.completion_tokens) == ("stop", 12, 15)
    conversation.ask("x", shown.append)
    prompt = tokenizer.decode(client.requests[1].token_ids)
    assert prompt == "[s]S[u]hi[a]<[s]S[u]hi[a]>[u]x[a]"
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "S"}]


def test_an_answer_may_fill_the_context_unless_told_otherwise(tokenizer: Tokenizer) -> None:
    conversation, client, shown = begin(tokenizer)
    conversation.ask("hi", shown.append)
    assert client.requests[0].sampling.max_tokens == 64 - 8 + 1  # one too many, for the engine to say what ended it
    conversation, client, shown = begin(tokenizer, sampling={"max_tokens": 2, "temperature": 0.5})
    answer = conversation.ask("hi", shown.append)
    assert (answer.text, answer.finish_reason) == ("<[", "length")
    assert client.requests[0].sampling.temperature == 0.5
    assert (answer.note, cut(answer)) == (None, "(cut after 2 tokens: --max-tokens)")


def test_an_answer_that_the_context_cuts_says_so(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    conversation, client, _ = begin(tokenizer, sampling={"min_tokens": 1000, "max_tokens": 2000})
    client.max_model_len, client.context_full = 12, "the KV cache holds 12 tokens"
    chat_command._answer_once(conversation, "hi")
    sampling = client.requests[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (5, 5)
    said = capsys.readouterr()
    assert said.out == "<[u]\n"
    assert said.err == "(cut after 4 tokens: the KV cache holds 12 tokens)\n"


def test_a_stop_string_ends_the_answer_and_the_request(tokenizer: Tokenizer) -> None:
    conversation, client, shown = begin(tokenizer, stop=["hi"])
    answer = conversation.ask("hi", shown.append)
    assert (answer.text, "".join(shown), answer.finish_reason) == ("<[u]", "<[u]", "stop")
    assert client.aborted == ["turn-0"]


def test_a_stopped_answer_stays_in_the_conversation(tokenizer: Tokenizer) -> None:
    conversation, client, shown = begin(tokenizer)
    answer = conversation.ask("hi", shown.append, lambda: len(shown) >= 3)
    assert (answer.text, answer.finish_reason) == ("<[u", "abort")
    assert client.aborted == ["turn-0"]
    assert conversation.messages[-1] == {"role": "assistant", "content": "<[u"}


def test_nobody_waits_until_the_engine_has_given_a_request_up(tokenizer: Tokenizer) -> None:
    """It may be in the middle of a long step; what it says later of that request is no part of the next answer."""
    conversation, client, shown = begin(tokenizer)
    outputs, late = client.outputs, [Output("turn-0", [65]), Output("turn-0", [], "abort")]

    def computing(timeout: float | None = None) -> list[Output]:
        assert client.aborted == [], "waited for the abort"
        return []

    client.outputs = computing
    answer = conversation.ask("long", shown.append, lambda: True)
    assert (answer.text, answer.finish_reason, client.aborted) == ("", "abort", ["turn-0"])
    assert conversation.messages == []  # or the next message would have to wait for this one
    client.outputs = lambda timeout: [*late, *outputs(timeout)]
    assert conversation.ask("hi", shown.append).text == "".join(shown) == "<[u]hi[a]>"


@pytest.mark.parametrize(
    ("text", "message"), [("x" * 80, "86 tokens.* 63 "), ("forbidden", "not that"), ("refuse", "")]
)
def test_a_refused_message_is_forgotten(tokenizer: Tokenizer, text: str, message: str) -> None:
    conversation, client, shown = begin(tokenizer)
    if text == "refuse":
        client.outputs = lambda timeout: [_error(client)]
        message = "the engine refuses"
    with pytest.raises(RequestError, match=message):
        conversation.ask(text, shown.append)
    assert conversation.messages == []


def _error(client: FakeClient) -> Any:
    return Output(client.requests[-1].id, [], "error", "the engine refuses")


def test_recommended_sampling(tmp_path: Path) -> None:
    assert recommended_sampling(tmp_path) == CHAT_DEFAULTS
    config = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert recommended_sampling(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"do_sample": False}))
    assert recommended_sampling(tmp_path) == {"temperature": 0.0, "top_k": 20, "top_p": 0.95}
    assert recommended_sampling(tmp_path, {"top_k": 3}) == {"temperature": 0.0, "top_k": 3, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": "hot"}))
    said = (
        r'generation_config\.json: temperature is "hot", but must be a number; correct the file, or give --temperature'
    )
    with pytest.raises(CheckpointError, match=said):
        recommended_sampling(tmp_path)
    assert recommended_sampling(tmp_path, {"temperature": 0.5})["temperature"] == 0.5


def test_the_first_interrupt_is_noted_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as noted:
        assert not noted
        os.kill(os.getpid(), signal.SIGINT)
        assert noted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def fake_engine(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClient]:
    """The commands with neither a model nor workers."""
    client = FakeClient(tokenizer)

    def prepare(
        model: str, options: EngineOptions, policy: str = "fcfs", look: object = None, **more: int
    ) -> EngineConfig:
        client.policies.append(policy)
        return EngineConfig(tmp_path / "model", 1)

    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tpctl.client.engine_client.EngineClient", lambda config, **_: client)
    for module in ("chat", "batch"):
        monkeypatch.setattr(f"tpctl.cli.{module}.prepare", prepare)
    yield client


def invoke(*arguments: str, stdin: str = "") -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_one_message_prints_the_answer_and_nothing_else(fake_engine: FakeClient) -> None:
    result = invoke("chat", "-m", "hi", "--system", "S", "--max-tokens", "9", "--seed", "4")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "<[s]S[u]h\n", "")
    sampling = fake_engine.requests[0].sampling
    assert (sampling.seed, sampling.temperature, sampling.max_tokens) == (4, 0.7, 9)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [([], 256), (["--max-num-batched-tokens", "999"], 999), (["--max-num-seqs", "300"], 300)],
)
def test_a_chat_on_a_cpu_takes_small_steps(
    fake_engine: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], tokens: int
) -> None:
    configs: list[EngineConfig] = []

    def settled(model: str, options: EngineOptions, look: object, cpu_tokens: int, **_: object) -> EngineConfig:
        return EngineConfig(tmp_path, 1, **asdict(engine_args(options, cpu_tokens=cpu_tokens).settle()))

    monkeypatch.setattr("tpctl.cli.chat.prepare", settled)
    engine = "tpctl.client.engine_client.EngineClient"
    monkeypatch.setattr(engine, lambda config, **_: configs.append(config) or fake_engine)
    monkeypatch.setattr("tpctl.client.tokenizer.Tokenizer", lambda *given, **named: Tokenizer(tmp_path / "model"))
    assert invoke("chat", "-m", "hi", "--device", "cpu", *options).exit_code == 0
    assert [config.max_num_batched_tokens for config in configs] == [tokens]


def test_a_message_from_a_pipe(fake_engine: FakeClient) -> None:
    assert invoke("chat", stdin="hi\nthere\n").stdout == "<[u]hi\nthere[a]>\n"
    empty = invoke("chat", stdin=" \n")
    assert empty.exit_code == 2
    assert "stdin is empty" in empty.stderr
    endless = invoke("chat", stdin="y\n" * (9 << 20))
    assert endless.exit_code == 2 and "stdin has more than 16777216 characters" in endless.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["-m", "a\udcff"], b"", r"-m holds '\udcff', which is no text in UTF-8"),
        ([], b"a\xff", r"the message is not valid Unicode: it holds '\udcff'"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused(arguments: list[str], stdin: bytes, said: str) -> None:
    result = CliRunner().invoke(app, ["chat", "nowhere", *arguments], input=stdin)  # before the model is looked for
    assert isinstance(result.exception, RequestError | UsageError)
    assert str(result.exception).startswith(said)


def test_a_wrong_option_does_not_wait_for_the_model(fake_engine: FakeClient) -> None:
    result = invoke("chat", "-m", "hi", "--temperature", "-1")
    assert isinstance(result.exception, UsageError)
    assert "temperature is -1.0, but must be 0, or from" in str(result.exception)
    assert fake_engine.requests == []


def test_a_base_model_is_told_apart(fake_engine: FakeClient, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model", template=None)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    result = invoke("chat", "-m", "hi")
    assert isinstance(result.exception, CheckpointError)
    assert "no chat template" in str(result.exception)


class Lines:
    """Stands in for who types: lines, and exceptions that keys raise."""

    def __init__(self, *events: Any) -> None:
        self.left = list(events)

    def read(self) -> str:
        event = self.left.pop(0)
        if not isinstance(event, str):
            raise event
        return event

    def fail(self, error: TpctlError) -> None:
        self.left.insert(0, error)


def talk(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> int | str | None:
    """The exit code of a chat in which ``lines`` are typed."""
    monkeypatch.setattr("tpctl.cli.chat.make_prompt", lambda: lines)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as ended:
        app(["chat"])
    return ended.value.code


def test_talk(fake_engine: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("", "/help", "/what", "hi", "forbidden", "/reset now", "/reset", "yo", "/exit", "never")
    assert talk(monkeypatch, lines) == 0
    captured = capsys.readouterr()
    assert captured.out == "<[u]hi[a]>\n<[u]yo[a]>\n"
    assert "is ready (tp 2, float32, sdpa attention on CPU, no speculation, which it cannot have there). /help" in (
        captured.err
    )
    assert "there is no command /what" in captured.err
    assert "refuses these messages: not that" in captured.err
    assert "/reset takes no argument (given: now); write /reset alone" in captured.err
    assert lines.left == ["never"]


def test_ctrl_c_between_two_messages_does_not_end_the_chat_and_ctrl_d_does(
    fake_engine: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines(KeyboardInterrupt(), "hi", KeyboardInterrupt(), "hi", EOFError(), "hi")
    assert talk(monkeypatch, lines) == 0
    assert len(fake_engine.requests) == 2
    assert lines.left == ["hi"]


def test_an_engine_that_dies_while_nobody_types_ends_the_chat_with_the_reason(
    fake_engine: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dying(Lines):
        def read(self) -> str:
            if len(self.left) == 1:
                fake_engine.fail(EngineError("rank 1 was killed (SIGKILL)"))
            return super().read()

    lines = Dying("hi", "lost")
    monkeypatch.setattr("tpctl.cli.chat.make_prompt", lambda: lines)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.argv", ["tpctl", "chat"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "tpctl: rank 1 was killed (SIGKILL)"
    assert lines.left == ["lost"]


def test_batch_command(fake_engine: FakeClient, tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "id": "B"}\n')
    result = invoke("batch", str(prompts), "-o", str(out))
    assert (result.exit_code, result.stdout) == (0, "")
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["<a>", "<b>"]
    assert "is ready (tp 2, float32, sdpa attention on CPU)\n" in result.stderr
    assert "2 prompts in" in result.stderr
    assert "3 preemptions, 0 errors" in result.stderr
    sampling = [request.sampling for request in fake_engine.requests]
    assert [(s.temperature, s.max_tokens, s.seed) for s in sampling] == [(0.0, 256, 0), (0.0, 256, 1)]
    assert invoke("batch", str(prompts), "-o", str(out), "--force", "--scheduling-policy", "fcfs").exit_code == 0
    assert invoke("batch", str(prompts), "--scheduling-policy", "sjf").exit_code == 2
    # Whoever reads rows as they come, or sends lines as they please, should not wait for a whole job.
    assert invoke("batch", str(prompts)).exit_code == 0
    assert invoke("batch", "-", "-o", str(out), "--force", stdin='{"prompt": "a"}\n').exit_code == 0
    assert invoke("batch", str(prompts), "--scheduling-policy", "makespan").exit_code == 0
    assert fake_engine.policies == ["auto", "fcfs", "fcfs", "fcfs", "makespan"]


def test_batch_to_stdout_with_an_error_row(fake_engine: FakeClient, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    result = invoke("batch", str(prompts))
    assert result.exit_code == 1
    assert [json.loads(line).get("text") for line in result.stdout.splitlines()] == ["<a>", None]


def test_batch_says_where_the_rows_are_when_the_engine_dies(fake_engine: FakeClient, tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "longer than the other"}\n')
    fake_engine.dies_after = 12
    result = invoke("batch", str(prompts), "-o", str(out))
    assert isinstance(result.exception, EngineError)
    assert f"1 finished row is in {out}.partial, go on with --resume" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "cannot read none.jsonl: No such file or directory"),
        (["in.jsonl", "-o", "in.jsonl"], "in.jsonl is input and output at once"),
        (["in.jsonl", "--resume"], "--resume needs a file"),
        (["in.jsonl", "-o", "no/out.jsonl"], "cannot write no/out.jsonl.partial: the folder does not exist"),
    ],
)
def test_batch_with_wrong_files(
    fake_engine: FakeClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("{}\n")
    result = invoke("batch", *arguments)
    assert isinstance(result.exception, TpctlError)
    assert message in str(result.exception)


@pytest.mark.parametrize("message", ["", " \n"])
def test_an_empty_message_is_refused(message: str) -> None:
    result = CliRunner().invoke(app, ["chat", "-m", message])
    assert result.exit_code == 2
    assert "the message is empty" in str(result.exception or result.output) + result.output
