"""SIGTERM and SIGHUP end a command in order."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

_came: list[int] = []


def take_signals() -> None:
    """From now on they end this process by ``SystemExit``, so that workers are stopped and files closed on the way."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)


def come() -> int | None:
    """The number of the first that has come, if one has. The exception is raised wherever the process is, and may have
    been caught there, by an import or a finalizer: so whoever is about to wait for long asks."""
    return _came[0] if _came else None


def is_end(error: SystemExit) -> bool:
    """Whether it is one of theirs."""
    return any(error.code == 128 + number for number in _came)


def end_if_told() -> None:
    """End as the signal would have ended this process, if one has come."""
    if _came:
        sys.exit(128 + _came[0])


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    _came.append(number)
    sys.exit(128 + number)
