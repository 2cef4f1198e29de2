"""The cache folder: where converted models and shards live, each made once and published whole.

A published folder never changes. It is built under a temporary name beside its final one and renamed into
place under a file lock, so a reader sees it complete or not at all, and two processes never build it twice.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tpctl.checkpoint.locks import exclusive
from tpctl.checkpoint.outputs import require_utf8
from tpctl.errors import SourceError


def cache_root() -> Path:
    """``TPCTL_CACHE``, else ``tpctl`` in the XDG cache folder. The folder need not exist yet.

    Raises:
        SourceError: it begins with the home of a user who is not known, or is not UTF-8.
    """
    chosen = os.environ.get("TPCTL_CACHE")
    base = chosen or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        root = Path(base).expanduser().absolute()
    except RuntimeError:
        raise SourceError(f"there is no home folder for {base}; set TPCTL_CACHE to the cache's full path") from None
    require_utf8(root)
    return root if chosen else root / "tpctl"


def file_name(text: str) -> str:
    """``text`` as one readable path component (``org/name`` becomes ``org--name``)."""
    return re.sub(r"[^\w.=+-]+", "--", text).strip("-.") or "unnamed"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` (made, with its folder, and removed again).

    Raises:
        SourceError: the lock file cannot be made there.
        OutputError: as ``exclusive``.
    """
    with ExitStack() as held:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(path))
        yield


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, calling ``build(temporary folder)`` first if it does not exist.

    Raises:
        SourceError: the cache cannot be written, or its disk is full; nothing is published then.
    """
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        temporary = folder.with_name(f".{folder.name}.partial")
        # The lock is ours, so a temporary folder found here belongs to a process that was killed.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with writing(folder.parent):
                temporary.mkdir()
                build(temporary)
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def writing(folder: Path, *, chosen: bool = False) -> Iterator[None]:
    """Turn what the operating system refuses while writing to ``folder`` into one line with the next step.

    chosen: the folder was named with -o, it is not the cache's.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # not the file system's
            raise
        reason = {
            errno.ENOSPC: "the disk is full; free some space, or set TPCTL_CACHE to a larger disk",
            errno.EDQUOT: "the disk quota is used up; free some space, or set TPCTL_CACHE to another disk",
            errno.EACCES: "no permission; set TPCTL_CACHE to a folder you may write to",
            errno.EPERM: "no permission; set TPCTL_CACHE to a folder you may write to",
            errno.EROFS: "it is read-only; set TPCTL_CACHE to a folder you may write to",
            errno.ENOTDIR: "a part of that path is a file; set TPCTL_CACHE to a folder",
            errno.EEXIST: "a file of that name is in the way; remove it or set TPCTL_CACHE elsewhere",
            errno.EISDIR: "a folder of that name is in the way; remove it or set TPCTL_CACHE elsewhere",
            errno.ENOENT: "a part of that path is missing and cannot be made; set TPCTL_CACHE to another folder",
            errno.ENAMETOOLONG: "the path is too long; set TPCTL_CACHE to a shorter one",
            errno.EIO: "the disk failed (input/output error); set TPCTL_CACHE to another one",
        }.get(error.errno or 0, error.strerror)
        if chosen:
            reason = re.sub("set TPCTL_CACHE.*", "choose another folder (-o)", reason or "")
        raise SourceError(f"cannot write to {folder}: {reason}") from None


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise unless the disk of ``folder`` (or of its nearest existing parent) has ``needed`` bytes free.

    Raises:
        SourceError: it has fewer.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SourceError(
            f"{what} needs {readable_bytes(needed)} but {existing} has {readable_bytes(free)} free; "
            "free some space or choose another place (-o, or TPCTL_CACHE for the cache)"
        )


def readable_bytes(count: float) -> str:
    """``count`` bytes in the largest binary unit that keeps it above 1, with one decimal."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
