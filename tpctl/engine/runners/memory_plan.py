"""How large a rank's KV cache is, and how long sequences can be with it: decided once, before it is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpctl.accounting import KvLayout, cache_for, gathering_cache, reserve, state_slots
from tpctl.engine.memory.host import CPU_SHARE, available_host_memory, count_slabs
from tpctl.engine.runners.loading import LoadedModel
from tpctl.errors import EngineError


@dataclass(frozen=True)
class MemoryPlan:
    """What all ranks agree on.

    Attributes:
        num_blocks: slabs of KV blocks, with one pool blocks; the minimum over the ranks.
        num_states: slots for states of recurrent layers, likewise; 0: the model has none.
        max_model_len: what the model, the settings and the KV cache allow, whichever is least.
        context_full: what an answer that ends at ``max_model_len`` is told.
        layout: how slabs are divided.
    """

    num_blocks: int
    max_model_len: int
    context_full: str
    num_states: int = 0
    layout: KvLayout | None = None


def plan_memory(loaded: LoadedModel, budget: int, later: int = 0) -> MemoryPlan:
    """Agree on a KV cache (collective).

    Args:
        budget: bytes that this rank's may take.
        later: bytes that steps will take beside it, where a cache of a size that was asked for leaves them.

    Raises:
        EngineError: it holds less than the length that was asked for, or does not fit.
    """
    settings, layout = loaded.settings, loaded.layout
    num_states = _count_states(loaded, budget)
    beside = num_states * loaded.state_bytes
    seqs, step = settings.max_num_seqs, settings.max_num_batched_tokens
    slabs = count_slabs(budget - beside, loaded.slab_bytes, layout, loaded.wanted_len, seqs, step, beside)
    num_blocks = loaded.group.minimum(slabs)
    longest = layout.longest(num_blocks)
    held = loaded.wanted_len if longest is None else longest
    if settings.max_model_len is not None and held < loaded.wanted_len:
        needed = layout.slabs(loaded.wanted_len) * loaded.slab_bytes
        needed = cache_for(needed, loaded.state_bytes, settings.max_num_seqs)
        raise EngineError(
            f"--max-model-len {loaded.wanted_len} does not fit: the KV cache holds {held} tokens; "
            f"give --kv-cache-memory {needed} (bytes a rank) or more, or lower the length"
        )
    max_model_len = min(loaded.wanted_len, held)
    full = f"prompt and answer fill the context of {max_model_len} tokens"
    if held < loaded.wanted_len:
        full = f"the KV cache holds {held} tokens, fewer than the model's {loaded.wanted_len}; raise --kv-cache-memory"
    if settings.kv_cache_memory is not None:  # what was found to be free need not be checked again
        check_cache(loaded, num_blocks * loaded.slab_bytes + beside, max_model_len, later)
    return MemoryPlan(num_blocks, max_model_len, full, num_states, layout)


def _count_states(loaded: LoadedModel, budget: int) -> int:
    """Slots for states in a cache of ``budget`` bytes (collective). Raises ``EngineError`` if it has room for none."""
    slot, most = loaded.state_bytes, loaded.settings.max_num_seqs
    if not slot:
        return 0
    slots = loaded.group.minimum(state_slots(budget, slot, most))
    if not slots:
        raise EngineError(
            f"{budget} bytes of cache have no room for the recurrent layers' state of one sequence ({slot} bytes, in "
            f"half of it); give --kv-cache-memory {cache_for(0, slot, most)} or more"
        )
    return slots


def plain_budget(loaded: LoadedModel) -> int:
    """Bytes that the KV cache may take on a CPU, and on a GPU with the reference backend."""
    if loaded.settings.kv_cache_memory is not None:
        return loaded.settings.kv_cache_memory
    if loaded.share is not None:
        left = loaded.share.nbytes - loaded.share.taken(loaded.group.device) - reserve(loaded.config.num_layers)
        return gathering_cache(left)
    return int(available_host_memory() * CPU_SHARE) // (loaded.group.size * loaded.settings.engines_on_host)


def check_cache(loaded: LoadedModel, used: int, max_model_len: int, later: int) -> None:
    """Refuse a KV cache of ``used`` bytes that was asked for (``--kv-cache-memory``) and that the memory left beside
    ``later`` cannot hold."""
    group, settings = loaded.group, loaded.settings
    assert settings.kv_cache_memory is not None
    if group.device.type == "cuda":
        where = "its GPU"
        free = torch.cuda.mem_get_info(group.device)[0] - reserve(loaded.config.num_layers) - later
    else:
        where, free = "its part of this machine's memory", available_host_memory() // group.size
    if used > free:
        raise EngineError(
            f"rank {group.rank} cannot hold a KV cache of {used / 2**30:.2f} GiB "
            f"(--kv-cache-memory {settings.kv_cache_memory / 2**30:.2f} GiB, but no more than "
            f"{settings.max_num_seqs} sequences of {max_model_len} tokens can use): {where} has "
            f"{max(0, free) / 2**30:.2f} GiB left for it; lower --kv-cache-memory, --max-num-seqs or "
            "--max-model-len, or leave the first out"
        )
