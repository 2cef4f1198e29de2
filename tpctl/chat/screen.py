"""What a chat shows: answers on stdout, all else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console

from tpctl.chat.wrap import WORD, break_points

if TYPE_CHECKING:
    from rich.status import Status

# What a model prints must not steer the terminal: no control characters but tab and newline.
_CONTROLS = dict.fromkeys([*(code for code in range(32) if code not in (9, 10)), *range(127, 160)])


class Stream(Protocol):
    """Shows one answer as it comes."""

    def push(self, piece: str) -> None: ...

    def close(self) -> None:
        """The answer has ended; the next thing shown begins a line."""
        ...


class RawStream:
    """Every piece as it comes, for files and pipes."""

    def push(self, piece: str) -> None:
        _to_stdout(piece)

    def close(self) -> None:
        self.push("\n")


class PlainStream:
    """The text as it is, for a terminal, with line breaks between words where it is wider than the window.

    A word is shown once its end is known, or it fills a line.

    Args:
        write: puts text on the terminal; else it goes to stdout.
    """

    def __init__(self, width: Callable[[], int], write: Callable[[str], None] | None = None) -> None:
        self._width = width
        self._write = write or _to_stdout
        self._column = 0
        self._word = ""  # the last one, which may go on
        self._broken = False  # what follows belongs to a word that is longer than a line

    def push(self, piece: str) -> None:
        *lines, rest = (self._word + piece).split("\n")
        out = ""
        for line in lines:
            out += "".join(map(self._placed, _words(line))) + self._new_line()
        *words, last = _words(rest) or [""]
        out += "".join(map(self._placed, words))
        self._word = last
        if cell_len(last) > self._width():
            out += self._placed(last)
            self._word, self._broken = "", True
        self._write(out)

    def close(self) -> None:
        self.push("\n")

    def _new_line(self) -> str:
        self._column, self._broken = 0, False
        return "\n"

    def _placed(self, word: str) -> str:
        """``word``, on a new line if it does not fit the one there is."""
        width, size = self._width(), cell_len(word.rstrip())
        broken, self._broken = self._broken, False
        fits = broken or not self._column or self._column + size <= width
        out = ("" if fits else self._new_line()) + word
        self._column += cell_len(word.expandtabs(8))
        if broken or size > width:
            self._column %= width  # the terminal has gone on by itself
        return out


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _words(line: str) -> list[str]:
    return [match[0] for match in WORD.finditer(line)]


def console(*, stderr: bool = False) -> Console:
    """rich's, for stdout unless told otherwise, which asks the window for its size each time.

    It takes the size from ``COLUMNS`` and ``LINES`` where these are set (as every program that has loaded readline sets
    them for its children), and a window that is resized does not change them.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return Console(stderr=stderr, highlight=False, _environ=environment)


class Screen:
    """The terminal, or what stands in for it.

    Args:
        plain: show answers as the model writes them, not as the Markdown that they may be.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self._plain = plain
        self._console = console()

    def stream(self) -> Stream:
        """What shows the next answer."""
        if not sys.stdout.isatty() or self._console.is_dumb_terminal:
            return RawStream()
        if self._plain:
            return PlainStream(lambda: max(self._console.width - 1, 1))
        from tpctl.chat.markdown_stream import MarkdownStream

        return MarkdownStream(self._console)

    def thoughts(self) -> Stream:
        """What shows the thoughts before an answer: above it on a terminal, else on stderr, so that stdout has answers
        alone."""
        from tpctl.chat.thoughts import ThoughtStream

        on_terminal = sys.stdout.isatty()
        return ThoughtStream(sys.stdout if on_terminal else sys.stderr, plain=self._plain)

    def note(self, text: str, indent: int = 0) -> None:
        """Lines for the person at the terminal, never mixed with answers.

        Args:
            indent: how far what a window is too narrow for is moved to the right.
        """
        if sys.stderr.isatty():
            width = console(stderr=True).width
            text = "\n".join(row for line in text.splitlines() for row in _wrapped(line, width, indent))
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[], None]]:
        """A spinner on stderr, where that is a terminal; yields what ends it, at the latest when the block does."""
        shown: list[Status] = []
        if sys.stderr.isatty():
            shown.append(console(stderr=True).status(text))
            shown[0].start()

        def end() -> None:
            while shown:
                shown.pop().stop()

        try:
            yield end
        finally:
            end()


class Shown:
    """An answer on its way to the screen: a spinner until its first piece, then streams, of thoughts and of text.

    Attributes:
        begun: whether there has been a piece of the answer itself.
    """

    def __init__(self, screen: Screen, end_waiting: Callable[[], None]) -> None:
        self._screen = screen
        self._stream: Stream | None = None
        self._thinking = False
        self._end_waiting = end_waiting
        self.begun = False

    def __call__(self, piece: str) -> None:
        self.begun = True
        self._show(safe(piece), thinking=False)

    def think(self, piece: str) -> None:
        """A piece of what is thought before the answer."""
        self._show(piece, thinking=True)

    def close(self) -> None:
        """The answer has ended, or failed."""
        self._end_waiting()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _show(self, piece: str, *, thinking: bool) -> None:
        if self._stream is None or thinking != self._thinking:
            self.close()
            self._stream = self._screen.thoughts() if thinking else self._screen.stream()
            self._thinking = thinking
        self._stream.push(piece)


def _wrapped(line: str, width: int, indent: int) -> list[str]:
    rows: list[str] = []
    while breaks := break_points(line, width - indent if rows else width):
        rows.append(line[: breaks[0]].rstrip())
        line = line[breaks[0] :]
    rows.append(line)
    return [rows[0], *(" " * indent + row for row in rows[1:])]


def safe(piece: str, stream: TextIO | None = None) -> str:
    """What a model wrote, as a stream may have it, which is stdout unless told otherwise."""
    return piece.translate(_CONTROLS) if (stream or sys.stdout).isatty() else piece
