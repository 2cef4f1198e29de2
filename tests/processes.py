"""Processes that a command started, found by what stands in their environment, and such as only keep cores busy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes beside, that do nothing but spin."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5 if processes else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def with_variable(needle: str) -> list[int]:
    """Ids of the live processes in whose environment ``needle`` (``NAME=value``, or its beginning) stands."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if needle.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def threads(pid: int) -> set[int]:
    """Ids of a process's threads."""
    return {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}


def wakeups(pid: int, but: Container[int] = ()) -> int:
    """How often threads of a process have waited for something; ``but``: those that do not count."""
    times = 0
    for thread in threads(pid):
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
            times += 0 if thread in but else int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return times
