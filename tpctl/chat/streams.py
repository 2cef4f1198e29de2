"""What text goes through on its way to stdout or stderr: as it comes, or broken between words; safe for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console

from tpctl.chat.wrap import WORD

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


def safe(piece: str, stream: TextIO | None = None) -> str:
    """What a model wrote, as a stream may have it, which is stdout unless told otherwise."""
    return piece.translate(_CONTROLS) if (stream or sys.stdout).isatty() else piece
