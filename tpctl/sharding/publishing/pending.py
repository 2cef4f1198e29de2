"""Folders that exist whole or not at all: written beside their final place, under a lock, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tpctl.checkpoint.cache import cache_root
from tpctl.checkpoint.locks import exclusive
from tpctl.checkpoint.outputs import resolved
from tpctl.errors import OutputError, TpctlError
from tpctl.manifest.manifest import MANIFEST
from tpctl.sharding.publishing.exchange import fsync_folder, recover, replace_folder
from tpctl.sharding.publishing.foreign import foreign_file


class PendingFolder:
    """A folder that becomes ``target`` when ``publish`` is called.

    Until then its files are in ``path``, a hidden folder beside ``target`` with a fixed name, so that a run
    that was killed can be resumed by the next one.

    Attributes:
        finished: the names of files that the next run can take over; after an error these stay, and no others.
    """

    def __init__(self, target: Path, path: Path, force: bool, lock: Path | None) -> None:
        self.target, self.path, self._force, self._lock = target, path, force, lock
        self.finished: set[str] = set()
        self.published = False

    @classmethod
    @contextmanager
    def open(cls, target: Path, *, force: bool, piece: str | None = None) -> Iterator[PendingFolder]:
        """Make the pending folder of ``target``, or find the one of a run that was killed, and lock it.

        The lock is held to the end, so that two runs wait for each other.

        Args:
            piece: names a part of ``target``, which may then exist as a shard folder. Every piece has a pending
                folder and a lock of its own, so that several are written at once; see ``alone``.

        Raises:
            OutputError: ``target`` exists and ``force`` is not given, or the folder cannot be made.
        """
        refuse_existing(target, force, add=piece is not None)
        target = resolved(target)  # what a link leads to is replaced, not the link
        name = target.name if piece is None else f"{target.name}.{piece}"
        path = target.parent / f".{name}.tpctl-partial"
        with ExitStack() as held:
            with readable_errors(path):
                target.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(_lock(target, name)))
                if piece is None:
                    recover(target)
                # Another run may have published while this one waited for the lock.
                refuse_existing(target, force, add=piece is not None)
                path.mkdir(exist_ok=True)
            pending = cls(target, path, force, None if piece is None else _lock(target, target.name))
            try:
                with readable_errors(path, made=True):
                    yield pending
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                if pending._settle() and isinstance(error, TpctlError | KeyboardInterrupt):
                    kept = "the finished parts are kept, the same command goes on after them"
                    error.args = (f"{error}; {kept}" if str(error) else kept,)
                raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of ``target`` itself, to look at it and ``publish``; it is held all along without a piece."""
        with ExitStack() as held:
            if self._lock is not None:
                held.enter_context(exclusive(self._lock))
                recover(self.target)
            yield

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
        """Make the folder appear as ``target``, replacing an older one in one step where the file system can.

        Only under the lock of ``target``: the older folder takes the pending one's name until it is removed.

        Raises:
            OutputError: a run without ``force`` finds a ``target`` that was not there when it began.
        """
        try:
            refuse_existing(self.target, self._force, add=self._lock is not None)
        except OutputError:
            if self._force:
                raise
            raise OutputError(
                f"{self.target} appeared while this ran, and is left as it is; move it away, or choose another folder "
                "(-o)"
            ) from None
        fsync_folder(self.path)
        old = None
        if self.target.exists():
            old = replace_folder(self.path, self.target)
        else:
            self.path.rename(self.target)
        self.published = True
        fsync_folder(self.target.parent)
        if old is not None:
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise OutputError(
                    f"{self.target} is complete, but the folder that it replaced cannot be removed "
                    f"({error.strerror}); remove {old} yourself"
                ) from None

    def remove_pieces(self) -> None:
        """Remove what killed runs have left of pieces of ``target``, which is complete now."""
        prefix, suffix = f".{self.target.name}.ranks-", ".tpctl-partial"
        for path in self.target.parent.glob(f".*{suffix}"):
            # A run that is still under way holds its lock, and finds out by itself.
            if path.name.startswith(prefix) and path != self.path:
                name = path.name.removeprefix(".").removesuffix(suffix)
                with suppress(OSError, OutputError), exclusive(_lock(self.target, name), wait=False):
                    shutil.rmtree(path)

    def _settle(self) -> bool:
        """After an error or an interrupt: remove all that is not finished; whether something is."""
        if self.published:
            return False
        with suppress(OSError):
            if not self.finished:
                shutil.rmtree(self.path)
            else:
                self.clean(self.finished)
        return bool(self.finished) and self.path.is_dir()


def refuse_existing(target: Path, force: bool, sources: Iterable[Path] = (), add: bool = False) -> None:
    """Check that ``target`` may be made, or replaced with ``force``; only a model's or an empty folder ever may.

    Whoever puts a file of their own into a model's folder keeps it, but for the cache's.

    Args:
        sources: folders that are read, and must not be replaced by what is made of them.
        add: a shard folder may exist without ``force``, since ranks are to be added to it.

    Raises:
        OutputError: it may not.
    """
    resolved(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; choose another folder (-o)")
    if not force:
        if add and (target / MANIFEST).is_file():
            return
        raise OutputError(f"{target} exists already; use --force to replace it, or choose another folder (-o)")
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise OutputError(f"{target} holds the source {source} itself; choose another folder (-o)")
    model = (target / MANIFEST).is_file() or (target / "config.json").is_file()
    if not model and any(target.iterdir()):
        raise OutputError(f"{target} holds no model, and --force replaces nothing else; choose another folder (-o)")
    own = None if target.resolve().is_relative_to(cache_root()) else foreign_file(target)
    if own is not None:
        raise OutputError(
            f"{target} holds {own}, which is no part of a model, and --force would remove it; move it away, or choose "
            "another folder (-o)"
        )


@contextmanager
def readable_errors(path: Path, *, made: bool = False) -> Iterator[None]:
    """Turn the operating system's refusals to write into one clear ``OutputError``.

    Args:
        made: ``path`` was there when this began.
    """
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
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise OutputError(f"{where} is no folder, so nothing can be made there; choose another (-o)") from None
        if error.errno == errno.ENOENT and made and not path.is_dir():
            gone = path if path.parent.is_dir() else path.parent
            raise OutputError(
                f"{gone} vanished while this ran, with all that was written; see what removes it, and run the command "
                "again"
            ) from None
        if error.errno == errno.ENOENT:  # a folder that takes no files, as in /proc
            raise OutputError(f"nothing can be made in {path.parent} ({error.strerror}); choose another (-o)") from None
        raise OutputError(f"{where}: {error.strerror or error}; nothing was published") from None


def _lock(target: Path, name: str) -> Path:
    return target.parent / f".{name}.tpctl-lock"
