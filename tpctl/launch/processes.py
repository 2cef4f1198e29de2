"""Finding and ending processes by a mark in their environment.

torchrun's workers lead their own sessions, and a worker whose agent was killed has another parent, so neither
a process group nor a parent id finds them all. A variable in the environment they were started with does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "TPCTL_RUN"


def marked(value: str) -> list[int]:
    """Ids of the live processes started with ``TPCTL_RUN=value``; none where there is no ``/proc``."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended, or it is another user's
        if wanted in variables:
            found.append(int(entry.name))
    return found


def kill_marked(value: str, timeout: float) -> bool:
    """SIGKILL every marked process until none is left.

    Returns:
        Whether that came true within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while pids := marked(value):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
