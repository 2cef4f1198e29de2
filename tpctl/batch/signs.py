"""Signs of life, as files that count up. Nobody compares two clocks: who watches sees a count move, or not, by its own.

A process also holds a lock while it lives, which tells at once on the same machine; elsewhere a lock may tell nothing.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tpctl.batch.folder import load, put
from tpctl.errors import OutputError

EVERY = 1.0
"""Seconds between two signs."""

PATIENCE = 30.0
"""Seconds without a sign after which a process counts as dead."""

_TRIES = 6
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """What tells this running system from others: locks hold within it."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return os.uname().nodename


def lock(path: Path) -> IO[bytes] | None:
    """Take the lock of a file and keep it as long as it is open; ``None`` if somebody has it.

    Where the file system knows no locks, nobody has it. Who only looks (``is_locked``) has it for a moment.

    Raises:
        OSError: the file cannot be made.
    """
    file = path.open("a+b")
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return file
        else:
            return file
    file.close()
    return None


def is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the lock of a file; ``None`` where the file system knows no locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


class Signs:
    """A thread that writes ``what()`` and a count to a file, every second until ``stop``."""

    def __init__(self, path: Path, what: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._what = what
        self._count = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of the file and the count
        self.failure: OutputError | None = None
        self.write()
        threading.Thread(target=self._run, daemon=True).start()

    def write(self) -> None:
        """Give a sign now.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            self._count += 1
            put(self._path, {"count": self._count, "machine": machine(), "host": os.uname().nodename, **self._what()})

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                self.write()
            except OutputError as error:
                self.failure = error
                return


class Watch:
    """Whether another process still gives signs.

    Attributes:
        said: what its last sign said.
        locked: it holds its lock, as far as that can be told from here.
        gone: it has ended. One that only fell silent is not ``alive`` either, but may give signs again.
    """

    def __init__(self, path: Path, lock: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to watch.

        Args:
            path: the file of its signs; ``lock``: the file that it keeps locked.
            clock: seconds, counted by this process alone.
        """
        self._path = path
        self._lock = lock
        self._clock = clock
        self._looked = clock()
        self.silent = 0.0
        self.said: dict[str, Any] = {}
        self.alive = True
        self.gone = False
        self.locked = False

    def look(self) -> bool:
        """Look again; whether it lives. A gap between two looks counts as one second at most: who slept may be the
        watcher."""
        now = self._clock()
        self.silent += min(max(now - self._looked, 0.0), EVERY)
        self._looked = now
        said = load(self._path)
        if said is not None and said.get("count") != self.said.get("count"):
            self.said, self.silent = said, 0.0
        # A process that is stopped holds its lock, and gives no signs.
        held = is_locked(self._lock) if self.said.get("machine") == machine() else None
        self.locked = held is True
        self.gone = self.said.get("state") in ("ended", "failed") or held is False
        self.alive = not self.gone and self.silent < PATIENCE
        return self.alive
