"""Folders that exist whole or not at all: written beside their final place, under a lock, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tpctl.errors import OutputError
from tpctl.partition.manifest import MANIFEST

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class PendingFolder:
    """A folder that becomes ``target`` when ``publish`` is called.

    Until then its files are in ``path``, a hidden folder beside ``target`` with a fixed name, so that a run
    that was killed can be resumed by the next one. A lock on that folder keeps two runs apart.
    """

    def __init__(self, target: Path, path: Path, lock: int) -> None:
        self.target, self.path, self._lock = target, path, lock

    @classmethod
    @contextmanager
    def open(cls, target: Path, *, force: bool) -> Iterator[PendingFolder]:
        """Lock the pending folder of ``target``, made if it is missing; wait while another run holds it.

        Left by an error, the folder is removed; left by an interrupt or a kill, it stays for the next run.

        Raises:
            OutputError: ``target`` exists and ``force`` is not given, or the folder cannot be made.
        """
        refuse_existing(target, force)
        target = target.resolve()  # what a link leads to is replaced, not the link
        path = target.parent / f".{target.name}.tpctl-partial"
        with readable_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        try:
            # Another run may have published while this one waited for the lock.
            refuse_existing(target, force)
            pending = cls(target, path, lock)
            try:
                with readable_errors(path):
                    yield pending
            except Exception:
                shutil.rmtree(path, ignore_errors=True)
                raise
        finally:
            os.close(lock)

    def clean(self, wanted: Collection[str] = ()) -> None:
        """Remove everything from the folder but the files named ``wanted``."""
        for path in self.path.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_space(self, needed: int) -> None:
        """Raise ``OutputError`` if the disk has less than ``needed`` bytes free."""
        stat = os.statvfs(self.path)
        free = stat.f_bavail * stat.f_frsize
        if needed > free:
            raise OutputError(
                f"{self.target} needs {needed} bytes, but only {free} are free on its disk; free "
                f"{needed - free} bytes or choose another place (-o, or TPCTL_CACHE for the cache)"
            )

    def publish(self) -> None:
        """Make the folder appear as ``target``, replacing an older one in one step."""
        _fsync_folder(self.path)
        if self.target.exists():
            _exchange(self.path, self.target)
            _fsync_folder(self.target.parent)
            shutil.rmtree(self.path)
        else:
            self.path.rename(self.target)
            _fsync_folder(self.target.parent)


def refuse_existing(target: Path, force: bool, sources: Iterable[Path] = ()) -> None:
    """Check that ``target`` may be made, or replaced with ``force``; only a model's or an empty folder ever may.

    Args:
        sources: folders that are read, and must not be replaced by what is made of them.

    Raises:
        OutputError: it may not.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; choose another folder (-o)")
    if not force:
        raise OutputError(f"{target} exists already; use --force to replace it, or choose another folder (-o)")
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise OutputError(f"{target} holds the source {source} itself; choose another folder (-o)")
    model = (target / MANIFEST).is_file() or (target / "config.json").is_file()
    if not model and any(target.iterdir()):
        raise OutputError(f"{target} holds no model, and --force replaces nothing else; choose another folder (-o)")


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one clear ``OutputError``."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"no space left while writing {where} ({error.strerror}); nothing was published, "
                "free some space or choose another place (-o, or TPCTL_CACHE for the cache)"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"no permission to write {where} ({error.strerror}); "
                "choose another folder (-o, or TPCTL_CACHE for the cache)"
            ) from None
        raise OutputError(f"{where}: {error.strerror or error}; nothing was published") from None


def _lock(path: Path) -> int:
    """Make ``path`` if needed and lock it. The lock is on the folder itself: it moves with it when it is renamed."""
    while True:
        path.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        # The folder was published or removed by the run that held the lock: take the new one.
        os.close(fd)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders' names atomically."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
