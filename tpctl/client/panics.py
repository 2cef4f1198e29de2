"""Calls into libraries in Rust: they fail with exceptions of all kinds, and with panics, which are no ``Exception``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tpctl.errors import TpctlError, shorten

Result = TypeVar("Result")
_STDERR = 2
_lock = threading.Lock()


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


@contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Drop what goes to the system's stderr; only if Python's own, which other threads use, is another file."""
    try:
        apart = sys.stderr is not None and sys.stderr.fileno() != _STDERR
    except (OSError, ValueError, AttributeError):
        apart = False  # a stand-in, behind which may be the system's
    if not apart:
        yield
        return
    with _lock:
        kept = os.dup(_STDERR)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, _STDERR, inheritable=True)
            yield
        finally:
            os.dup2(kept, _STDERR, inheritable=True)
            os.close(kept)
            os.close(nowhere)
