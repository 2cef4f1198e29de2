"""Calls into libraries in Rust: they fail with exceptions of all kinds, and with panics, which are no ``Exception``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from tpctl.errors import TpctlError, shorten

Result = TypeVar("Result")
_STDERR = 2


def guarded(work: Callable[[], Result], otherwise: Callable[[str], TpctlError], *, quiet: bool = True) -> Result:
    """Do ``work``; what fails is raised as the error that ``otherwise`` makes of one line about it.

    Args:
        quiet: keep the library's report of a panic, with a trace of its calls, from the terminal.
    """
    try:
        if not quiet:
            return work()
        with _nothing_on_stderr():
            return work()
    except (TpctlError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise otherwise(shorten(" ".join(str(error).split()) or type(error).__name__, 200)) from None


class _Nowhere:
    """The system's stderr, sent nowhere while anybody wants it to be: threads do so at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._kept = -1

    def __enter__(self) -> None:
        with self._lock:
            if not self._wanted:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                try:
                    self._kept = os.dup(_STDERR)
                    os.dup2(nowhere, _STDERR, inheritable=True)
                finally:
                    os.close(nowhere)
            self._wanted += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                os.dup2(self._kept, _STDERR, inheritable=True)
                os.close(self._kept)


_nowhere = _Nowhere()


@contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Drop what goes to the system's stderr; only if Python's own, which other threads use, is another file."""
    try:
        apart = sys.stderr is not None and sys.stderr.fileno() != _STDERR
    except (OSError, ValueError, AttributeError):
        apart = False  # a stand-in, behind which may be the system's
    with _nowhere if apart else nullcontext():
        yield
