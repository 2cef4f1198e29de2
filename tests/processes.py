"""Processes that a command started, found by what stands in their environment."""

from __future__ import annotations

from pathlib import Path


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
