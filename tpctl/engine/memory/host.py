"""How many KV blocks a rank can hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tpctl.accounting import KvLayout
from tpctl.errors import EngineError

CPU_SHARE = 0.25
"""Share of the machine's available memory that the ranks' KV caches may take together on a CPU."""


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping (Linux' MemAvailable, 4 GiB where that is unknown) and without
    passing the limit of a control group that this process is in, such as a container's.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    machine = _fields(root / "proc/meminfo").get("MemAvailable:")
    free = 4 << 30 if machine is None else machine * 1024
    return max(0, min([free, *_group_rooms(root)]))


def _group_rooms(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves. Pages of files count as free: the kernel drops them first,
    and MemAvailable counts them so too."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            bases, limit, used, prefix = [mounts, mounts / "unified"], "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            bases, limit, used, prefix = [mounts / "memory"], "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        inside = Path(path.strip("/"))
        # Every group up to the mount limits its children. Inside a container the path may be the host's, and only
        # the mount itself, which then is the container's group, is there.
        for folder in (base / level for base in bases for level in dict.fromkeys((inside, *inside.parents))):
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                stat = _fields(folder / "memory.stat")
                files = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
                yield most - max(0, taken - files)


def _number(path: Path) -> int | None:
    """The number in ``path``; ``None`` if there is none (``max`` means no limit)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """The lines ``name number ...`` of ``path``."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def count_slabs(
    budget: int,
    slab_bytes: int,
    layout: KvLayout,
    max_model_len: int,
    max_num_seqs: int,
    step: int = 0,
    beside: int = 0,
) -> int:
    """Slabs that ``budget`` bytes hold, and no more than ``max_num_seqs`` sequences of full length can use.

    Args:
        step: tokens of prompts that are computed together at most.
        beside: bytes of the cache that other things take.

    Raises:
        EngineError: the budget does not hold two blocks of each pool.
    """
    most = layout.slabs(max_model_len, max_num_seqs, step)
    slabs, least = min(budget // slab_bytes, most), layout.slabs(2 * layout.block_size)
    if slabs < least and slabs < most:
        held = f"{slabs} blocks of {layout.block_size} tokens ({slab_bytes} bytes each)"
        if len(layout.windows) > 1:
            held = f"{slabs} pieces of {slab_bytes} bytes, in which layers keep blocks of {layout.block_size} tokens"
        raise EngineError(
            f"{budget} bytes of KV cache hold {held}, "
            f"but at least {least} are needed; give --kv-cache-memory {least * slab_bytes + beside} or more"
        )
    return slabs
