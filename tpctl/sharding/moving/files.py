"""Open files read and written at offsets by several threads, and the count of the bytes that pass."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import itemgetter
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

GAP_BYTES, MOST_PIECES = 4096, 500
"""What is read at once has at most such gaps, which are read along, and so many pieces (the system takes 1024)."""

_GAP = np.empty(GAP_BYTES, np.uint8)
"""Where they are read to, by all threads; nobody looks at it."""


class Files:
    """Open file descriptors by path; reads and writes at offsets. Close it with ``with``.

    What is written goes to the disk while more is read: left to ``sync`` at the end, it would be waited for.
    """

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._unsynced: dict[int, int] = {}
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
        self._read(path, [out], offset)

    def read_pieces(self, path: Path, pieces: Iterable[tuple[int, Bytes]]) -> None:
        """Fill the array of each of ``pieces`` of ``path``, given with its first byte; neighbours are read at once."""
        views: list[Bytes] = []
        first = reach = 0
        for offset, out in sorted(pieces, key=itemgetter(0)):
            if views and (not reach <= offset <= reach + GAP_BYTES or len(views) >= MOST_PIECES):
                self._read(path, views, first)
                views = []
            if not views:
                first = reach = offset
            if offset > reach:
                views.append(_GAP[: offset - reach])
            views.append(out)
            reach = offset + out.nbytes
        self._read(path, views, first)

    def _read(self, path: Path, views: Sequence[Bytes], offset: int) -> None:
        """Fill ``views``, one behind the other, from byte ``offset`` of ``path`` on."""
        left = sum(view.nbytes for view in views)
        while left:
            try:
                got = os.preadv(self._open[path], [view.data for view in views], offset)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read at byte {offset}: {error.strerror}") from None
            if not got:
                raise CheckpointError(
                    f"{path} ends at byte {offset}, {counted(left, 'byte')} too early: it was cut while it was "
                    "read; fetch or copy it again, and run the command again"
                )
            left, offset = left - got, offset + got
            if left:
                views = _rest(views, got)

    def write(self, path: Path, data: Bytes, offset: int) -> None:
        """Write ``data`` at byte ``offset`` of ``path``."""
        view, file = data.data.cast("B"), self._open[path]
        while view:
            put = os.pwrite(file, view, offset)
            view, offset = view[put:], offset + put
        waiting = self._unsynced.get(file, 0) + data.nbytes  # of threads at once, some may be left out
        self._unsynced[file] = 0 if waiting > FLUSH_BYTES else waiting
        if waiting > FLUSH_BYTES:
            self._flusher.submit(self._flush, file)

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


def _rest(views: Sequence[Bytes], done: int) -> list[Bytes]:
    """``views`` without their first ``done`` bytes."""
    left = []
    for view in views:
        if done < view.nbytes:
            left.append(view.reshape(-1)[done:])
        done = max(0, done - view.nbytes)
    return left


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
