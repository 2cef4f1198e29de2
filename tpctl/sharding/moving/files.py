"""Open files read and written at offsets by several threads, and the count of the bytes that pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import numpy as np
from numpy.typing import NDArray

from tpctl.checkpoint.progress import Progress
from tpctl.cores import affinity_cores
from tpctl.errors import CheckpointError, counted

Bytes = NDArray[np.uint8]


class Files:
    """Open file descriptors by path; reads and writes at offsets. Close it with ``with``."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def open(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """Open ``path`` (once) and return its descriptor. Not for use by several threads at once."""
        if path not in self._open:
            try:
                self._open[path] = os.open(path, flags | os.O_CLOEXEC)
            except OSError as error:
                if flags != os.O_RDONLY:
                    raise
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        return self._open[path]

    def read(self, path: Path, out: Bytes, offset: int) -> None:
        """Fill ``out`` from byte ``offset`` of ``path`` on."""
        view = out.data.cast("B")
        while view:
            try:
                got = os.preadv(self._open[path], [view], offset)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read at byte {offset}: {error.strerror}") from None
            if not got:
                raise CheckpointError(
                    f"{path} ends at byte {offset}, {counted(len(view), 'byte')} too early: it was cut while it was "
                    "read; fetch or copy it again, and run the command again"
                )
            view, offset = view[got:], offset + got

    def write(self, path: Path, data: Bytes, offset: int) -> None:
        """Write ``data`` at byte ``offset`` of ``path``."""
        view = data.data.cast("B")
        while view:
            put = os.pwrite(self._open[path], view, offset)
            view, offset = view[put:], offset + put

    def sync(self, paths: Iterable[Path]) -> None:
        for path in paths:
            os.fsync(self._open[path])


class ByteCounter:
    """Counts bytes for several threads and tells ``progress``; ``stop`` ends the others when one fails."""

    def __init__(self, total: int, what: str, progress: Progress | None) -> None:
        self.total, self.what, self.done = total, what, 0
        self.stop = Event()
        self._progress = progress
        self._lock = Lock()

    def check(self) -> None:
        """Raise ``Stopped`` if another thread failed."""
        if self.stop.is_set():
            raise Stopped

    def reset(self, done: int) -> None:
        """Go back to ``done`` bytes, after a failure that is made good."""
        self.done = done
        self.stop.clear()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self._progress is not None:
                self._progress(self.done, self.total, self.what)


class Stopped(Exception):
    """Raised inside a worker because another one failed."""


def in_parallel(tasks: Sequence[Callable[[], None]], tally: ByteCounter) -> None:
    """Run ``tasks`` in order on a few threads; the first failure stops the others and is raised."""

    def work(task: Callable[[], None]) -> None:
        try:
            tally.check()
            task()
        except BaseException:
            tally.stop.set()
            raise

    with ThreadPoolExecutor(_threads()) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            failures = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # Ctrl-C while waiting: let the threads go at their next band
            tally.stop.set()
            raise
    for error in failures:
        if not isinstance(error, Stopped):
            raise error


def _threads() -> int:
    return min(8, affinity_cores())
