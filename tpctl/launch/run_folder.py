"""The folder that an engine's processes share while they run: socket, configuration, logs.

The command line removes it at its end. One that was killed cannot, so the next one does: a folder says in
``parent.pid`` whose it is, and the file stays locked for as long as that process lives. (A lock, because an id may be
taken by another process, and means nothing in another container that shares the folder for temporary files.)
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import IO

_RECORD = "parent.pid"
_LONGEST_SOCKET_PATH = 100  # bytes; the kernel's limit is 108 on Linux, 104 on macOS, with the closing zero
_SHORT = "/tmp"


class RunFolder:
    """A new folder that only this user can enter, with a path short enough for a socket in it."""

    def __init__(self) -> None:
        """Make it, and remove those of this user's command lines that were killed.

        Raises:
            OSError: there is no place for it.
        """
        for place in {tempfile.gettempdir(), _SHORT}:
            _sweep(Path(place))
        self._record: IO[str] | None = None
        self.path = Path(tempfile.mkdtemp(prefix="tpctl-"))
        if len(os.fsencode(self.path / "socket")) > _LONGEST_SOCKET_PATH:
            self.path.rmdir()
            self.path = Path(tempfile.mkdtemp(prefix="tpctl-", dir=_SHORT))
        try:
            self._record = _claim(self.path)
        except OSError:
            self.remove()
            raise

    def keep(self) -> None:
        """Leave the folder for the user to read; nobody removes it."""
        (self.path / _RECORD).unlink(missing_ok=True)
        self._release()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._record is not None:
            self._record.close()


def _claim(folder: Path) -> IO[str]:
    """Write the record, which appears under its name only when it is locked."""
    unlocked = folder / f"{_RECORD}.part"
    record = unlocked.open("w", encoding="utf-8")
    try:
        record.write(f"{os.getpid()}\n")
        record.flush()
        fcntl.flock(record, fcntl.LOCK_EX)
        unlocked.rename(folder / _RECORD)
    except OSError:
        record.close()
        raise
    return record


def _sweep(place: Path) -> None:
    for folder in place.glob("tpctl-*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            with (folder / _RECORD).open("r+") as record:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # no record, or its owner lives
            continue
