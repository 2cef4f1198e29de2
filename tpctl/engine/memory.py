"""How many KV blocks a rank can hold."""

from __future__ import annotations

from pathlib import Path

from tpctl.errors import EngineError

CPU_SHARE = 0.25
"""Share of the machine's available memory that the ranks' KV caches may take together on a CPU."""


def available_host_memory() -> int:
    """Bytes that can be taken without swapping (Linux' MemAvailable), or 4 GiB where that is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def count_blocks(budget: int, block_bytes: int, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks that ``budget`` bytes hold, and no more than ``max_num_seqs`` sequences of full length can use.

    Raises:
        EngineError: the budget does not hold two blocks.
    """
    most = -(-max_model_len // block_size) * max_num_seqs
    blocks = min(budget // block_bytes, most)
    if blocks < 2 and blocks < most:
        raise EngineError(
            f"{budget} bytes of KV cache hold {blocks} blocks of {block_size} tokens ({block_bytes} bytes each), "
            f"but at least 2 are needed; give --kv-cache-memory {2 * block_bytes} or more"
        )
    return blocks
