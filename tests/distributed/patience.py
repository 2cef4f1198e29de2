"""How long a busy machine is waited for, and what is compared."""

from __future__ import annotations

from tests.processes import with_variable

PATIENCE = 240.0  # seconds that anything may take on a busy machine

EXACT = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory", "64MiB")


def workers_of(parent: int) -> list[int]:
    """Ids of the live worker processes that a command started."""
    return with_variable(f"TPCTL_PARENT_PID={parent}")
