"""What is typed at the prompt, key by key; lines where the terminal cannot do that; and the history."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from tpctl.chat import history as history_module
from tpctl.chat.commands import completions
from tpctl.chat.history import ChatHistory
from tpctl.chat.prompt import LinePrompt, TerminalPrompt, is_open
from tpctl.errors import EngineError

PASTE = "\x1b[200~one\r\ntwo\rthree\nfour 中文\r\nfive\x1b[201~"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard:
        yield keyboard


@pytest.fixture
def prompt(keyboard: PipeInput) -> TerminalPrompt:
    return TerminalPrompt(completions, InMemoryHistory(["before"]), input=keyboard, output=DummyOutput())


def type_at(prompt: TerminalPrompt, keyboard: PipeInput, keys: str) -> None:
    """Type once the prompt is there."""
    before: Any = prompt
    before._fail_if_failed = lambda: keyboard.send_text(keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        (f"{PASTE}\r", "one\ntwo\nthree\nfour 中文\nfive"),
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt+Enter, as a terminal sends it, and Esc Enter
        ("one\ntwo\r", "one\ntwo"),  # Ctrl-J
        ('"""one\rtwo\r"""\r', "one\ntwo"),
        ('"""one"""\r', "one"),
        ("half\x03whole\r", "whole"),  # Ctrl-C clears
        ("pasted\rhalf\x03whole\r", "whole"),  # and what follows is no part of a paste, however fast it comes
        ("\x03\x03x\r", EOFError),  # twice where nothing is
        ("\x03a\x03\x03b\r", "b"),  # but not with something typed between
        ("\x04", EOFError),
        ("ab\x01\x04\r", "b"),  # Ctrl-D deletes where something is
        ("/sys\tS\r", "/system S"),
        ("/load /nowhere/at/\t\r", "/load /nowhere/at/"),
        ("\x1b[A again\r", "before again"),
        ("\r", ""),
    ],
)
def test_keys(keyboard: PipeInput, prompt: TerminalPrompt, keys: str, message: str | type[BaseException]) -> None:
    type_at(prompt, keyboard, keys)
    if isinstance(message, str):
        assert prompt.read() == message
    else:
        with pytest.raises(message):
            prompt.read()


def test_lines_typed_before_there_is_a_prompt_are_sent_in_order(keyboard: PipeInput, prompt: TerminalPrompt) -> None:
    # Enter as it comes while nobody is asked, and as it comes between two prompts.
    keyboard.send_text('/set seed 7\n/system S\rone\nso\x1b\nfar\n"""a\nb"""\n\x1b[200~x\ny\x1b[201~ and\nunfini')
    early = [prompt.read() for _ in range(6)]
    assert early == ["/set seed 7", "/system S", "one", "so\nfar", "a\nb", "x\ny and"]
    type_at(prompt, keyboard, "shed\r")
    assert prompt.read() == "unfinished"


def test_a_paste_that_is_not_marked_is_one_message(keyboard: PipeInput, prompt: TerminalPrompt) -> None:
    def press_enter() -> None:
        time.sleep(0.2)
        keyboard.send_text(" end\r")

    for paste in ("one\r/set x\rthree\r\rfive", "one\r/set x\rthree\r\rfive\r"):
        type_at(prompt, keyboard, paste)
        typist = threading.Thread(target=press_enter)
        typist.start()
        assert prompt.read() == paste.replace("\r", "\n") + " end"
        typist.join()


def test_a_pasted_command_takes_nothing_of_what_follows(keyboard: PipeInput, prompt: TerminalPrompt) -> None:
    type_at(prompt, keyboard, "/set seed 7\r/reset\rtext\r")
    assert prompt.read() == "/set seed 7"
    type_at(prompt, keyboard, "")
    assert [prompt.read() for _ in range(2)] == ["/reset", "text"]


def test_a_failure_ends_the_prompt_and_keeps_what_is_typed(
    keyboard: PipeInput, prompt: TerminalPrompt, capsys: pytest.CaptureFixture[str]
) -> None:
    keyboard.send_text("half a thought")
    buffer: Any = prompt._session.default_buffer
    buffer.on_text_changed += lambda _: buffer.text == "half a thought" and prompt.fail(EngineError("rank 1 is gone"))
    for _ in range(2):  # and again, where it is asked again
        with pytest.raises(EngineError, match="rank 1 is gone"):
            prompt.read()
    assert next(iter(prompt._session.history.load_history_strings())) == "half a thought"
    assert capsys.readouterr().err == "(what was being typed is kept: the Up key of the next chat brings it back)\n"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], LinePrompt]]:
    """A prompt whose stdin gives these bytes, then ends."""
    read, write = os.pipe()
    with os.fdopen(read) as stdin, os.fdopen(write, "wb", buffering=0) as typed:
        monkeypatch.setattr("sys.stdin", stdin)

        def make(data: bytes) -> LinePrompt:
            typed.write(data)
            typed.close()
            return LinePrompt()

        yield make


def test_lines(lines: Callable[[bytes], LinePrompt], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = lines(b'one\n two \n"""a\nb"""\n\xff\nlast')
    assert [prompt.read() for _ in range(5)] == ["one", "two", "a\nb", "\udcff", "last"]
    with pytest.raises(EOFError):
        prompt.read()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ">>> >>> >>> ... >>> >>> >>> "


def test_a_failure_ends_waiting_for_a_line(lines: Callable[[bytes], LinePrompt]) -> None:
    prompt = lines(b"")
    prompt.fail(EngineError("rank 1 is gone"))
    with pytest.raises(EngineError, match="rank 1 is gone"):
        prompt.read()


@pytest.mark.parametrize(
    ("text", "open"), [('"""a', True), ('"""', True), ('""""', True), ('"""a"""', False), ('a """', False), ("", False)]
)
def test_is_open(text: str, open: bool) -> None:
    assert is_open(text) == open


def test_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MOST", 3)
    file, readline = tmp_path / "cache" / "messages", tmp_path / "readline"
    readline.write_text("old one\n\nold two\n")
    history = ChatHistory(file, readline)
    assert file.stat().st_mode & 0o777 == 0o600
    history.store_string("new\nof two lines 中文")
    history.store_string("half \udcff")
    kept = ["half ?", "new\nof two lines 中文", "old two"]
    assert list(ChatHistory(file, readline).load_history_strings()) == kept
    for number in range(3):
        history.store_string(str(number))
    assert file.read_text().count("# ") == 7
    assert list(ChatHistory(file).load_history_strings()) == ["2", "1", "0"]
    assert file.read_text().count("# ") == 3  # the older ones have gone
    assert [entry.name for entry in file.parent.iterdir()] == ["messages"]


def test_no_place_for_a_history_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    history = ChatHistory(tmp_path / "file" / "messages")
    history.store_string("x")
    assert list(history.load_history_strings()) == []
