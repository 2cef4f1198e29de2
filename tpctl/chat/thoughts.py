"""What a model thinks before it answers, as a chat shows it: dimmed, or between two lines that say so."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from tpctl.chat.streams import PlainStream, console, safe

BEGIN, END = "(thinking)\n", "(end of thinking)\n"
_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


class ThoughtStream:
    """Shows the thoughts before one answer.

    Args:
        stream: stdout or stderr. What is no terminal gets the text as it is.
        plain: dim nothing.
    """

    def __init__(self, stream: TextIO, *, plain: bool = False) -> None:
        self._stream = stream
        terminal = stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        window = console(stderr=True)
        self._dimmed = terminal and not plain
        self._lines = PlainStream(lambda: max(window.width - 1, 1), self._write) if terminal else None
        if not self._dimmed:
            self._put(BEGIN)

    def push(self, piece: str) -> None:
        text = safe(piece, self._stream)
        if self._lines is not None:
            self._lines.push(text)
        else:
            self._put(text)

    def close(self) -> None:
        """The thoughts have ended; the next thing shown begins a line."""
        if self._lines is not None:
            self._lines.close()
        else:
            self._put("\n")
        self._put("\n" if self._dimmed else END)

    def _write(self, text: str) -> None:
        if text:
            self._put(f"{_DIM}{text}{_NORMAL}" if self._dimmed else text)

    def _put(self, text: str) -> None:
        with suppress(OSError):  # as with notes: an answer does not end because nobody reads these
            self._stream.write(text)
            self._stream.flush()


class Aside:
    """Thoughts on stderr, where stdout is for the answer alone; nothing at all where there are none."""

    def __init__(self, *, plain: bool = False) -> None:
        self._plain = plain
        self._stream: ThoughtStream | None = None

    def push(self, piece: str) -> None:
        if self._stream is None:
            self._stream = ThoughtStream(sys.stderr, plain=self._plain)
        self._stream.push(piece)

    def close(self) -> None:
        """They have ended, for now at least."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
