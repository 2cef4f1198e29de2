"""The terminal while nobody is asked anything: typing that is not shown, Ctrl-C that is only noted."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_LOCAL = 3  # index of the local modes in what ``tcgetattr`` gives


@contextmanager
def quiet() -> Iterator[None]:
    """Show nothing of what is typed meanwhile. It is kept for whoever reads next; Ctrl-C interrupts, and discards it.

    Enter reaches the reader as Ctrl-J. What is pasted is marked, if the terminal can.
    """
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):  # no terminal
        yield
        return
    modes = [*before]
    modes[_LOCAL] &= ~(termios.ECHO | termios.ICANON)
    try:
        _set(modes)
        _mark_pastes(True)
        yield
    finally:
        _mark_pastes(False)
        _set(before)


def _mark_pastes(on: bool) -> None:
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        with suppress(OSError, ValueError):
            sys.stdout.write(f"\x1b[?2004{'h' if on else 'l'}")
            sys.stdout.flush()


def _set(modes: list[int | list[bytes | int]]) -> None:
    with suppress(termios.error, OSError, ValueError):  # the terminal is gone
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, modes)


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Note every Ctrl-C in a list, and raise nothing: an exception could strike in the middle of a message to the
    workers."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
