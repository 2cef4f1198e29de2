"""A server's lines on stderr, written by a thread: whoever reads them, or the disk that they go to, may stand still."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from tpctl.cli.console import note
from tpctl.errors import printable

MOST = 4096
"""Texts that wait to be written."""

LAST_SECONDS = 1.0
"""In which those are written that wait at the end."""


class Log:
    """As a context manager, until what waits has been written, or ``LAST_SECONDS`` are over.

    What does not fit is dropped; how much that was is said as soon as there is room again, in its place.
    """

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        """``write``: writes a text, by this object's thread; to stderr, if it is left out."""
        self._write = to_stderr if write is None else write
        self._waiting: deque[str] = deque()
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: it may never come back from where it writes.
        self._thread = threading.Thread(target=self._run, name="tpctl-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(LAST_SECONDS)

    def note(self, text: str) -> None:
        """Have a text written; never waits for that."""
        with self._changed:
            if len(self._waiting) >= MOST:
                self._dropped += 1
                return
            self._tell_dropped()
            self._waiting.append(text)
            self._changed.notify()

    def _tell_dropped(self) -> None:
        if self._dropped:
            many = "1 line was" if self._dropped == 1 else f"{self._dropped:,} lines were"
            self._waiting.append(f"tpctl serve: {many} dropped here, since stderr took none meanwhile")
            self._dropped = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._tell_dropped()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                text = self._waiting.popleft()
            self._write(text)


def to_stderr(text: str) -> None:
    """As ``console.note``, but past Python's buffer: at its end Python would wait for whoever holds that, and abort.

    Where stderr takes no more (the log's disk is full, its reader gone) the work goes on without.
    """
    try:
        number = sys.stderr.fileno()
    except (OSError, ValueError):  # something in its place
        note(text)
        return
    data = ("\n".join(map(printable, text.split("\n"))) + "\n").encode(errors="backslashreplace")
    with suppress(OSError):
        while data:
            data = data[os.write(number, data) :]
