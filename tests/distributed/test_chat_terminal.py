"""``tpctl chat`` in a real terminal (tmux), with the demo model: what somebody sees who types, pastes, waits, resizes
the window and presses Ctrl-C. One chat for all of it, since a start takes seconds; the tests run in their order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.patience import EXACT, PATIENCE, workers_of
from tests.processes import with_variable
from tpctl.checkpoint.sources import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
]
LONG = "word and number 17 " * 1000  # 6,000 tokens
ASK = "Say something, or /help"  # what an empty prompt shows


class Window:
    """A terminal of 80 x 24 with one program in it."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._folder = folder
        self._socket = str(folder / "tmux")
        self._paste = folder / "paste"
        # Ctrl-C is for the program: the shell, which gets it too, must not end of it.
        line = f"trap : INT; {shlex.join(command)}; echo '[ended: '$?']'; exec sleep 3600"
        self.tmux("-f", os.devnull, "new-session", "-d", "-x", "80", "-y", "24", line)

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(["tmux", "-S", self._socket, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    def type(self, text: str, *keys: str) -> None:
        if text:
            self.tmux("send-keys", "-l", "--", text)
        if keys:
            self.tmux("send-keys", *keys)

    def paste(self, text: str, *, marked: bool = True) -> None:
        """As a terminal does that was asked to mark what is pasted, or as one that cannot."""
        self._paste.write_text(text)
        self.tmux("load-buffer", str(self._paste))
        self.tmux("paste-buffer", *(["-p"] if marked else []))

    def resize(self, width: int, height: int) -> None:
        self.tmux("resize-window", "-x", str(width), "-y", str(height))

    def processor_seconds(self) -> float:
        """What the chat and its workers have computed so far, however busy the machine is."""
        ticks = 0
        for pid in with_variable(f"TPCTL_CACHE={self._folder / 'cache'}"):
            with suppress(OSError):  # of one that has just ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def screen(self) -> str:
        return self.tmux("capture-pane", "-p").rstrip()

    def until(self, pattern: str) -> str:
        """The screen, once it matches."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, screen := self.screen, re.MULTILINE):
            assert time.monotonic() < deadline, f"waited in vain for {pattern}:\n{screen}"
            time.sleep(0.05)
        return screen


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    folder = tmp_path_factory.mktemp("t")
    model = str(resolve("demo").folder)
    chat = [sys.executable, "-m", "tpctl", "chat", model, "--temperature", "0", "--max-tokens", "400", *EXACT[:2]]
    # What was said in earlier chats is kept in the cache: this one gets a cache of its own.
    window = Window(folder, "env", f"TPCTL_CACHE={folder / 'cache'}", "TERM=screen", "COLUMNS=80", "LINES=24", *chat)
    try:
        window.until(ASK)
        yield window
    finally:
        window.tmux("kill-server")


@pytest.fixture(scope="module")
def failed_before(request: pytest.FixtureRequest) -> int:
    """Tests of this process that had failed when the window was made."""
    return request.session.testsfailed


@pytest.fixture(autouse=True)
def where_it_was_left(request: pytest.FixtureRequest, failed_before: int) -> None:
    """Each test goes on where the one before it ended: behind one that failed all others would wait in vain."""
    if request.session.testsfailed > failed_before:
        pytest.skip("a test before failed, and the window is not where it would have left it")


def test_a_paste_of_five_lines_is_one_message(window: Window) -> None:
    window.paste("Answer with one word.\nWhat is the\ncapital of\nFrance?\n你好，再见")
    shown = window.until("再见")
    assert shown.endswith(">>> Answer with one word.\n... What is the\n... capital of\n... France?\n... 你好，再见")
    window.type("", "C-u", "BSpace")  # edited as a whole: the line of two-cell characters goes
    assert window.until(r"France\?\Z").endswith("... France?")
    window.type("", "Enter")
    shown = window.until(rf"{ASK}\Z")
    assert shown.count("\n>>> ") == 2  # the message, and the next prompt
    window.type("/stats", "Enter")
    assert re.search(r"^answer +\d+ tokens", window.until(f"^drafts.*\n>>> {ASK}"), re.MULTILINE)


def test_wide_characters_are_edited_in_place(window: Window) -> None:
    window.type("/system 你好世界", "Left", "Left", "BSpace")
    window.until(r"/system 你世界\Z")
    window.type("们", "Enter")
    assert "\n(system prompt: 你们世界)\n" in window.until(r"\(system prompt: .*\n>>> ")
    window.type('/system ""', "Enter")
    window.until(r"\(there is no system prompt\)\n>>> ")


def test_one_interrupt_stops_a_prompt_that_is_computed(window: Window) -> None:
    window.type("/reset", "Enter")
    window.until(r"\(a new conversation\)\n>>> ")
    window.paste(LONG)
    window.until(r"number 17\Z")
    window.type("", "Enter")
    window.until("computing the prompt")
    time.sleep(1)
    before = window.processor_seconds()
    window.type("", "C-c")
    window.until(rf"\(stopped: nothing was said yet\)\n>>> {ASK}")
    assert window.processor_seconds() - before < 6  # a chunk, on two cores; all of the prompt takes 30 and more
    assert "computing" not in window.screen
    window.type("What is the capital of France?", "Enter")
    assert "\nThe capital of France is Paris.\n" in window.until(rf"Paris\.\n>>> {ASK}")


def test_what_is_typed_during_an_answer_waits_for_the_prompt(window: Window) -> None:
    window.type("Describe the sea at length.", "Enter")
    window.until(r"at length\.\n+.{60}")
    window.type("/set seed 7", "Enter")
    window.type("/system Be brief.", "Enter")
    window.paste("pasted\n/reset")  # marked here too
    window.type("中文")
    shown = window.until(r"pasted\n\.\.\. /reset中文\Z")
    told = r"\n>>> /set seed 7\nseed +7\n>>> /system Be brief\.\n\(system prompt: Be brief\.\)\n"
    assert re.search(rf"{told}>>> pasted\n\.\.\. /reset中文\Z", shown)
    assert shown.count(">>> pasted") == shown.count("/set seed 7") == 1  # nothing is echoed into the answer
    window.type("", "C-c")  # clears it, and ends nothing
    window.until(rf"^>>> {ASK}\Z")
    window.type('/system ""', "Enter")
    window.until(r"\(there is no system prompt\)\n>>> ")


def test_a_paste_that_the_terminal_does_not_mark_is_one_message(window: Window) -> None:
    window.paste("one\n/reset\n中文\n\nfive", marked=False)
    shown = window.until(r"five\Z")
    assert shown.endswith(">>> one\n... /reset\n... 中文\n...\n... five")
    window.type("", "C-c")
    window.until(rf"^>>> {ASK}\Z")


def test_an_answer_in_a_window_that_changes_its_width(window: Window, tmp_path: Path) -> None:
    window.type("Tell a very long story about a dragon.", "Enter")
    window.until(r"about a dragon\.\n+.{60}")
    window.resize(50, 20)
    time.sleep(2)
    window.resize(70, 24)
    time.sleep(2)
    window.type("", "C-c")
    window.until(rf"^\(stopped\)\n>>> {ASK}")
    shown = window.tmux("capture-pane", "-p", "-S", "-")  # with what has left the window
    assert shown.count("Tell a very long story") == 1
    answer = shown.rpartition("about a dragon.\n")[2].partition("\n(stopped)")[0].split()
    window.resize(80, 24)
    window.type(f"/save {tmp_path / 'story.json'}", "Enter")
    window.until(rf"saved|story\.json[^>]*>>> {ASK}")
    said = json.loads((tmp_path / "story.json").read_text())["messages"][-1]["content"]
    assert answer == said.split()  # nothing stands there twice, and nothing is missing


def test_after_a_stopped_answer_an_interrupt_ends_nothing(window: Window) -> None:
    window.type("half typed", "C-c")
    window.until(rf">>> {ASK}")
    window.type("", "C-c")
    window.until(r">>> Ctrl-C again, or Ctrl-D, ends the chat\Z")
    window.type("x", "BSpace")
    assert "[ended" not in window.screen


def test_history_and_completion(window: Window) -> None:
    window.type("", "Up", "Up")  # before /save
    window.until(r">>> Tell a very long story about a dragon\.\Z")
    window.type("", "C-c")
    window.type("/regen", "Tab")
    window.until(r">>> /regenerate\Z")
    window.type("", "C-c")


def test_a_rank_that_dies_while_nobody_asks_is_shown_at_once(window: Window) -> None:
    pane = int(window.tmux("display-message", "-p", "#{pane_pid}"))
    chat = next(pid for pid in _children(pane))
    (worker,) = workers_of(chat)
    window.type("half a thought")
    window.until(r">>> half a thought\Z")
    os.kill(worker, signal.SIGKILL)
    shown = window.until(r"^\[ended: 1\]")
    assert ">>> half a thought\n(what was being typed is kept" in shown
    assert "tpctl: rank 0 was killed (SIGKILL)" in shown


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
