"""What a chat shows: answers on stdout, all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tpctl.chat.streams import PlainStream, RawStream, Stream, console, safe
from tpctl.chat.thoughts import ThoughtStream
from tpctl.chat.wrap import break_points

if TYPE_CHECKING:
    from rich.status import Status


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
