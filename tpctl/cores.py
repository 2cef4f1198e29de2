"""How many CPU cores this process may run on."""

from __future__ import annotations

import os


def affinity_cores() -> int:
    """The cores of this process's affinity, or the machine's where the system knows no affinity; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
