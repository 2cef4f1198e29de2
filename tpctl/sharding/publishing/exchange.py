"""Putting a folder in another one's place: in one step where the system can, else in two that can be undone."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_SWAP = 2
"""``RENAME_EXCHANGE`` of Linux' renameat2, and ``RENAME_SWAP`` of macOS' renamex_np."""

_CANNOT = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""How a system or file system (NFS among them) says that it exchanges no names."""


def replace_folder(new: Path, target: Path) -> Path:
    """Rename ``new`` to ``target``, which exists; where the older folder is now.

    Where names cannot be exchanged, there is a moment without ``target``; ``recover`` mends what a kill in it leaves.

    Raises:
        OSError: it cannot be renamed; ``target`` is as before.
    """
    try:
        _exchange(new, target)
        return new
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    old = _old(target)
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    return old


def recover(target: Path) -> None:
    """Give ``target`` back, or remove its older version, if a kill ended ``replace_folder`` half-way."""
    old = _old(target)
    if not old.is_dir():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)


def fsync_folder(path: Path) -> None:
    """Wait until the folder's entries are on disk, where its file system can tell."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(fd)


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.tpctl-old"


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders' names atomically."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _SWAP)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, _SWAP)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
