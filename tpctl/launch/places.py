"""Where engines that share a host run: each on GPUs, or on a share of the cores, of its own."""

from __future__ import annotations

import os
from pathlib import Path

from tpctl.cores import affinity_cores
from tpctl.errors import UsageError
from tpctl.launch.device import visible_gpus


def places(count: int | None, tp_size: int, device: str, shared: bool) -> list[str | None]:
    """The GPUs of each replica, as ``CUDA_VISIBLE_DEVICES`` has them; ``None`` each on a CPU.

    Args:
        count: ``None``: as many as there is room for; on a CPU one for each memory node.
        shared: several replicas may use a GPU: what each takes of it is said.

    Raises:
        UsageError: there is no room for so many.
    """
    if device == "cpu":
        return [None] * (count or max(1, min(_memory_nodes(), affinity_cores() // tp_size)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(visible_gpus())]
    count = count or max(1, len(gpus) // tp_size)
    if count * tp_size > len(gpus) and not shared:
        raise UsageError(
            f"--replicas {count} with --tp {tp_size} need {count * tp_size} GPUs, but {len(gpus)} visible; lower one, "
            "or give --kv-cache-memory, and replicas share GPUs"
        )
    dealt = [gpus[at % len(gpus)] for at in range(count * tp_size)]
    return [",".join(dealt[first : first + tp_size]) for first in range(0, count * tp_size, tp_size)]


def cores_of(replica: int, count: int) -> set[int] | None:
    """A share of this process's cores; ``None`` where there are fewer than replicas, or the system pins nothing."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        return None
    return set(cores[replica * len(cores) // count : (replica + 1) * len(cores) // count])


def _memory_nodes(folder: Path = Path("/sys/devices/system/node")) -> int:
    return len(list(folder.glob("node[0-9]*"))) or 1
