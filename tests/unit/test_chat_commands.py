"""The loop of a chat and its commands, with a scripted person at the terminal and an engine that echoes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_client import FakeClient, ScriptedPrompt, engine_info, engine_stats, write_tokenizer
from tpctl.chat.commands import COMMANDS, completions
from tpctl.chat.repl import Repl
from tpctl.chat.screen import Screen
from tpctl.client.conversation import Answer, Conversation
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, RequestError
from tpctl.wire.guide import NAMES as GUIDES
from tpctl.wire.messages import Output
from tpctl.wire.sampling import SamplingParams


class Chat:
    """A chat that is over: what was shown, what the engine was asked."""

    def __init__(self, tokenizer: Tokenizer, *lines: str | BaseException, client: FakeClient | None = None) -> None:
        self.client = client or FakeClient(tokenizer, max_model_len=400)
        engine: Any = self.client
        values = {"temperature": 0.7, "seed": 5}
        self.conversation = Conversation(engine, tokenizer, sampling=values)
        self.prompt = ScriptedPrompt(*lines)
        Repl(engine, self.conversation, Screen(), self.prompt, "demo").run()

    @property
    def prompts(self) -> list[str]:
        return [bytes(request.token_ids).decode("latin-1") for request in self.client.requests]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "model"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines on stderr."""
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/what is it", "there is no command /what; /help shows them"),
        ("/reset now", "/reset takes no argument (given: now); write /reset alone"),
        ("/exit please", "/exit takes no argument (given: please); write /exit alone"),
        ("/regenerate", "there is no answer yet that could be made anew; say something first"),
        ("/stats", "there is no answer yet to tell of"),
        ("/save", "/save needs a file; write /save FILE"),
        ("/load", "/load needs a file; write /load FILE"),
        ("/load nowhere", "cannot read nowhere: No such file or directory"),
        ("/load /dev/null", "/dev/null is no regular file; name one that /save wrote"),
        (
            "/save no/such",
            "cannot write no/such: No such file or directory; name a file in a folder where you may write",
        ),
        ("/save /", "/ is a folder; name a file in it, as /chat.json"),
        ("/save --force /", "/ is a folder; name a file in it, as /chat.json"),
        ("/save /dev/full", "/dev/full is a pipe or a device; name a file"),
        ('/set stop "\\ud800"', "the stop text is not valid Unicode"),
        ("/set colour blue", 'there is no option "colour"; /set shows all'),
        ("/set temperature hot", 'temperature is "hot", but must be a number'),
        ("/set temperature -1", "temperature is -1.0, but must be 0, or from 0.0001 to 10000"),
        ("/set top-p NaN", "top_p is nan, but must be above 0 and at most 1"),
        ("/set max_tokens 0", "max_tokens is 0, but must be at least 1"),
        ("/set seed 1.5", "seed is 1.5, but must be a whole number"),
        ("/set stop [1]", 'stop is [1], but must be a text, or a list of texts like ["\\n", "END"]'),
        ("x" * 500, "the message has 506 tokens with what the chat template adds, but at most 399 leave room"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tokenizer: Tokenizer,
    said: Callable[[], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = Chat(tokenizer, line)
    (found,) = said()
    assert found.startswith(f"tpctl: {message}")
    assert chat.client.requests == []
    assert chat.conversation.sampling == {"temperature": 0.7, "seed": 5}


def test_set(tokenizer: Tokenizer, said: Callable[[], list[str]]) -> None:
    chat = Chat(tokenizer, "/set temperature 0.25", "/set parameter repeat_penalty 2", '/set stop "\\u005b"', "hi")
    sampling = chat.client.requests[0].sampling
    assert (sampling.temperature, sampling.repetition_penalty, sampling.seed) == (0.25, 2.0, 5)
    assert chat.conversation.messages[-1]["content"] == "<"
    assert said() == ["temperature          0.25", "repetition_penalty   2", 'stop                 ["["]']


def test_set_shows_every_option(tokenizer: Tokenizer, said: Callable[[], list[str]]) -> None:
    Chat(tokenizer, "/set top_k 3", "/set top_k default", "/set max_tokens 9", "/set")
    shown = dict(line.split(None, 1) for line in said()[3:])
    for_programs = {"logprobs", "prompt_logprobs", "logit_bias", "guide_after", "guide_name", *GUIDES}
    assert set(shown) == {field.name for field in fields(SamplingParams)} - for_programs | {"stop"}
    assert (shown["temperature"], shown["top_k"], shown["max_tokens"], shown["stop"]) == ("0.7", "0", "9", "none")


def test_system(tokenizer: Tokenizer, said: Callable[[], list[str]]) -> None:
    chat = Chat(tokenizer, "/system", "/system Be\nbrief", "hi", '/set system "S"', "yo", '/system ""', "/system")
    assert [tokenizer.decode(request.token_ids) for request in chat.client.requests] == [
        "[s]Be\nbrief[u]hi[a]",
        "[s]S[u]hi[a]<[s]Be\nbrief[u]hi[a]>[u]yo[a]",
    ]
    assert chat.conversation.messages[0] == {"role": "user", "content": "hi"}
    none, first = "(there is no system prompt)", ["(system prompt: Be", "brief)"]
    assert said() == [none, *first, "(system prompt: S)", none, none]


def test_a_system_prompt_that_the_template_refuses_changes_nothing(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}[a]"
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "model", template=template))
    conversation = Chat(tokenizer).conversation
    with pytest.raises(RequestError, match="no system role"):
        conversation.set_system("S")
    assert (conversation.system, conversation.messages) == (None, [])


def test_regenerate_takes_the_next_seed(tokenizer: Tokenizer, said: Callable[[], list[str]]) -> None:
    chat = Chat(tokenizer, "hi", "/regenerate", "/regen", "/set temperature 0", "/regenerate")
    assert [request.sampling.seed for request in chat.client.requests] == [5, 6, 7, 8]
    assert len({tuple(request.token_ids) for request in chat.client.requests}) == 1
    assert [message["content"] for message in chat.conversation.messages] == ["hi", "<[u]hi[a]>"]
    assert said()[-1].startswith("(temperature is 0, so the answer will be the same")


def test_stats(tokenizer: Tokenizer, said: Callable[[], list[str]]) -> None:
    Chat(tokenizer, "hi", "/stats")
    prompt, first, answer, context = said()
    assert prompt == "prompt       8 tokens, 1 of them known from before"
    assert first.startswith("first token  after 0.")
    assert answer.startswith("answer       11 tokens, ")
    assert answer.endswith(" tokens/s")
    assert context == "context      19 of 400 tokens (5%)"


@pytest.mark.parametrize(
    ("kind", "counters", "shown"),
    [
        ("ngram", {}, "0 of 0 accepted, in all answers; looked up in the text (n-gram)"),
        (
            "mtp",
            {"draft_tokens": 40, "accepted_tokens": 30},
            "30 of 40 accepted (75%), in all answers; by the model's own layer (MTP)",
        ),
    ],
)
def test_stats_of_an_engine_that_speculates(
    kind: str,
    counters: dict[str, int],
    shown: str,
    tokenizer: Tokenizer,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = engine_info(speculation=kind, max_model_len=400)
    monkeypatch.setattr(FakeClient, "wait_ready", lambda self, told=None: info)
    monkeypatch.setattr(FakeClient, "stats", lambda self: engine_stats(**counters))
    Chat(tokenizer, "hi", "/stats")
    assert said()[-1] == f"drafts       {shown}"


def test_tokens_per_second_are_those_behind_the_first() -> None:
    assert Answer("x", "stop", 9, 0, 11, seconds_to_first=2.0, seconds=4.0).tokens_per_second == 5.0
    assert Answer("x", "stop", 9, 0, 1, seconds_to_first=2.0, seconds=2.0).tokens_per_second is None


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    file = tmp_path / "a chat.json"
    first = Chat(tokenizer, "/system S", "hi", '/set stop "END"', f"/save {file}", f"/save {file}", "yo")
    assert said()[2:] == [
        f"(2 messages saved to {file})",
        f"tpctl: {file} exists already; /save --force {file} replaces it",
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["a chat.json"]
    second = Chat(tokenizer, "/set temperature 0", f'/load "{file}"', "yo", f"/save --force {file}", "/reset")
    one, other = first.client.requests[1], second.client.requests[0]
    assert (one.token_ids, one.sampling) == (other.token_ids, other.sampling)
    assert second.conversation.stop == ("END",)
    assert second.conversation.messages == [{"role": "system", "content": "S"}]
    saved = json.loads(file.read_text())
    assert (saved["model"], saved["sampling"]) == ("demo", {"temperature": 0.7, "seed": 5})
    assert [message["content"] for message in saved["messages"]][::2] == ["hi", "yo"]


GOOD: dict[str, Any] = {
    "format": "tpctl-chat-1",
    "model": "demo",
    "system": None,
    "sampling": {},
    "stop": [],
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no saved chat: not JSON (Expecting property name"),
        ("[" * 100_000, "is no saved chat: not JSON (nested too deeply)"),
        ("[]", "is no saved chat: it holds [], but must hold an object"),
        (GOOD | {"format": "x"}, 'is no saved chat: its "format" must be "tpctl-chat-1", not "x"'),
        (GOOD | {"more": 1}, 'is no saved chat: the field "more" is unknown'),
        ({"format": "tpctl-chat-1"}, 'is no saved chat: the field "messages" is missing'),
        (GOOD | {"stop": [""]}, 'is no saved chat: "stop" holds "", but must hold texts that are not empty'),
        (GOOD | {"system": 1}, 'is no saved chat: "system" is 1'),
        (GOOD | {"messages": GOOD["messages"][:1]}, 'is no saved chat: "messages" must be a list of pairs'),
        (GOOD | {"messages": GOOD["messages"][::-1]}, "is no saved chat: message 1 must have the role user"),
        (GOOD | {"sampling": {"top_p": 3}}, "cannot be gone on with: top_p is 3.0, but must be above 0 and at most 1"),
        (GOOD | {"system": "\ud800"}, "cannot be gone on with: the text is not valid Unicode"),
    ],
)
def test_what_save_did_not_write_is_not_loaded(
    tokenizer: Tokenizer, tmp_path: Path, said: Callable[[], list[str]], text: Any, message: str
) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    chat = Chat(tokenizer, "hi", f"/load {file}")
    assert len(chat.conversation.messages) == 2
    assert chat.conversation.messages[0]["content"] == "hi"
    (found,) = said()
    assert found.startswith(f"tpctl: {file} {message}")


def test_help_names_every_command(tokenizer: Tokenizer, said: Callable[[], list[str]]) -> None:
    Chat(tokenizer, "/help")
    lines = said()
    assert [line.split()[0] for line in lines] == [command.name for command in COMMANDS] + ["Enter", "Ctrl-C", "Ctrl-D"]
    assert max(map(len, lines)) <= 80


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.json").touch()
    (tmp_path / "other").mkdir()
    assert list(completions("/re")) == ["/regenerate", "/reset"]
    assert list(completions("/set top")) == ["/set top_k ", "/set top_p "]
    assert list(completions("/load o")) == ["/load one.json", "/load other/"]
    assert list(completions("/set top_k 3")) == list(completions("re")) == list(completions("")) == []


class Prefilling(FakeClient):
    """Computes a prompt, and sees Ctrl-C meanwhile. It tells of no abort for as long as that takes."""

    def outputs(self, timeout: float | None = None) -> list[Output]:
        if self.requests[-1].id in self.aborted:
            raise AssertionError("somebody waits for an abort")
        if len(self.requests) > 1:
            return [Output(self.requests[0].id, [], "abort"), *super().outputs(timeout)]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return []


def test_an_interrupt_stops_a_prompt_at_once_and_takes_it_back(
    tokenizer: Tokenizer, said: Callable[[], list[str]]
) -> None:
    chat = Chat(tokenizer, "a long prompt", "hi", client=Prefilling(tokenizer))
    assert chat.client.aborted == ["turn-0"]
    assert [message["content"] for message in chat.conversation.messages] == ["hi", "<[u]hi[a]>"]
    assert said() == ["(stopped: nothing was said yet)"]


def test_an_interrupt_between_two_things_does_not_end_the_chat(
    tokenizer: Tokenizer, said: Callable[[], list[str]]
) -> None:
    chat = Chat(tokenizer, KeyboardInterrupt(), "hi", KeyboardInterrupt(), KeyboardInterrupt(), "yo")
    assert len(chat.client.requests) == 2
    assert said() == ["(interrupted)"] * 3


def test_a_rank_that_dies_while_the_chat_is_idle_ends_it(tokenizer: Tokenizer) -> None:
    client = FakeClient(tokenizer, max_model_len=400)

    class Idle(ScriptedPrompt):
        def read(self) -> str:
            if not self.left:
                client.fail(EngineError("rank 1 was killed (SIGKILL)"))
            return super().read()

    engine: Any = client
    repl = Repl(engine, Conversation(engine, tokenizer), Screen(), Idle("hi"), "demo")
    with pytest.raises(EngineError, match="rank 1 was killed"):
        repl.run()
    assert len(client.requests) == 1
