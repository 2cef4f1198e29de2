"""Open files read and written at offsets by several threads, and the count of the bytes that pass."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock

import numpy as np
from numpy.typing import NDArray

from tpctl.checkpoint.progress import Progress
from tpctl.cores import affinity_cores
from tpctl.errors import CheckpointError, counted

Bytes = NDArray[np.uint8]


FLUSH_BYTES = 8 << 20
"""Of a file, so many are sent to the disk at once."""


class Files:
    """Open file descriptors by path; reads and writes at offsets. Close it with ``with``.

    What is written goes to the disk while more is read: left to ``sync`` at the end, it would be waited for.
    """

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._unsynced: dict[Path, int] = {}
        self._flusher = ThreadPoolExecutor(1)
        self._failure: OSError | None = None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.shutdown(cancel_futures=True)
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
        waiting = self._unsynced.get(path, 0) + data.nbytes  # of threads at once, some may be left out
        self._unsynced[path] = 0 if waiting > FLUSH_BYTES else waiting
        if waiting > FLUSH_BYTES:
            self._flusher.submit(self._flush, self._open[path])

    def _flush(self, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError as error:  # which the kernel tells once
            self._failure = error

    def sync(self, paths: Iterable[Path]) -> None:
        """Wait until all that was written is on the disk; nothing is written afterwards.

        Raises:
            OSError: some of it could not be.
        """
        self._flusher.shutdown(cancel_futures=True)
        for path in paths:
            os.fsync(self._open[path])
        if self._failure is not None:
            raise self._failure


@contextmanager
def few_collections() -> Iterator[None]:
    """Let Python look for garbage seldom: the records of 60,000 tensors are none, and looking through them again and
    again takes as long as reading them."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
