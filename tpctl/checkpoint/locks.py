"""One process at a time: a lock file beside what is written, which also works where the file system keeps no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tpctl.errors import OutputError, printable

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""How ``flock`` fails on network file systems without a lock service."""


SILENT = 3.0
"""Seconds of waiting of which nothing is said."""

_PAUSE = 0.02  # seconds


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path``; wait while another process or thread holds it, if ``wait``. A line on stderr tells
    whoever wonders why nothing goes on.

    The system drops the lock of a process that ends, however it ends. The file is removed by its holder, so that
    whoever waited on the removed one must look again. It is opened for writing, without which NFS refuses.

    Where the file system keeps no locks, the file's existence is the lock: then nothing waits, and a killed
    process leaves it.

    Raises:
        OutputError: the file system keeps no locks, and the file is there already.
        OSError: the file cannot be made; ``BlockingIOError``: another holds it, and ``wait`` is false.
    """
    fd = _acquire(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(fd)


def _acquire(path: Path, how: int) -> int:
    while True:
        fd, made = _open(path)
        try:
            _lock(fd, how, path)
            held = os.fstat(fd)
            # Over NFS the name may be remembered a while; what is known of a file is fresh once it is locked.
            if held.st_nlink and os.path.samestat(held, path.stat()):
                return fd
        except FileNotFoundError:
            pass  # its holder removed it: take a new one
        except OSError as error:
            if error.errno in _NO_LOCKS and made:
                with suppress(OSError):
                    os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return fd
            if error.errno != errno.ESTALE:  # which is NFS' word for a removed file
                os.close(fd)
                if error.errno in _NO_LOCKS:
                    raise OutputError(_taken(path)) from None
                raise
        except BaseException:  # Ctrl-C while waiting
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, how: int, path: Path) -> None:
    """``flock``, which says so where it takes long."""
    silent_until = time.monotonic() + SILENT
    while not how & fcntl.LOCK_NB and time.monotonic() < silent_until:
        try:
            return fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
    if not how & fcntl.LOCK_NB:
        with suppress(OSError):  # nobody reads it
            print(printable(f"waiting for another process, which holds {path}"), file=sys.stderr, flush=True)
    return fcntl.flock(fd, how)


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor of ``path``, and whether this made the file."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _taken(path: Path) -> str:
    holder = "another run"
    with suppress(OSError, ValueError):
        holder = path.read_text(encoding="utf-8").strip()[:200] or holder
    return (
        f"{path} says that {holder} is writing there, and this file system keeps no locks to wait for; "
        "wait until that has ended, or remove the file if it has"
    )
