"""What a GPU's steps take beside weights and KV cache, found by running the largest one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tpctl.accounting import (
    MOST_NET_CHUNKS,
    captured_bytes,
    gathered_logits,
    net_chunk_bytes,
    reserve,
    sampled_rows,
    table_bytes,
)
from tpctl.arch.delta_net import state_sizes
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.steps.states import NUMBERS
from tpctl.errors import EngineError
from tpctl.kernels.delta_net.chunks import ChunkTables
from tpctl.kernels.delta_net.tables import Chunks, NewTokens
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.batch import ForwardBatch, PoolTables, StateTables
from tpctl.layers.delta_net.state import LayerState


@dataclass(frozen=True)
class StepMemory:
    """Bytes of device memory.

    Attributes:
        weights, activations: held before the largest step was run, and what it took on top.
        captured: what all captured steps share for their activations.
        later: taken after the KV cache: ``captured``, tables, what sampling takes.
    """

    weights: int
    activations: int
    captured: int
    later: int


def measure_step(loaded: LoadedModel, rows: int, prefix: int = 0) -> StepMemory:
    """Run the largest step, and tell what steps take.

    Args:
        rows: of the largest step that a graph may hold.
        prefix: bytes that captured steps keep for prefixes that all decodes share.
    """
    settings, device = loaded.settings, loaded.group.device
    tokens = settings.max_num_batched_tokens
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    _run_largest(loaded)
    torch.cuda.synchronize(device)
    loaded.timings.lap("largest step", started)
    activations = torch.cuda.max_memory_allocated(device) - before
    logits = sampled_rows(settings.max_num_seqs) * loaded.model.lm_head.out_features * loaded.dtype.itemsize
    tp_size, eager = loaded.group.size, settings.enforce_eager
    captured = captured_bytes(activations, tokens, rows, logits, tp_size, _chunk_bytes(loaded))
    width, pools = table_width(loaded, loaded.wanted_len), len(loaded.layout.windows)
    later = table_bytes(settings.max_num_seqs, 0 if eager else rows, width, pools)
    later += gathered_logits(logits, tp_size) if eager else captured + prefix
    if loaded.model.mtp is not None:
        row = loaded.config.blueprint.hidden_size * loaded.dtype.itemsize + 4 * width
        later += row * (rows + settings.max_num_seqs)  # what a predictor reads of a step, and makes of it
    later += logits + loaded.sampler.working_bytes(settings.max_num_seqs)  # sampling with the host's help
    return StepMemory(before, activations, captured, later)


def table_width(loaded: LoadedModel, max_model_len: int) -> int:
    """Blocks of the longest sequence."""
    return -(-max_model_len // loaded.backend.block_size)


def cuda_budget(loaded: LoadedModel, steps: StepMemory) -> int:
    """Bytes that the KV cache may take: what is left of the GPU's share.

    Raises:
        EngineError: nothing is.
    """
    if loaded.settings.kv_cache_memory is not None:
        return loaded.settings.kv_cache_memory
    share, reserved = loaded.share, reserve(loaded.config.num_layers)
    assert share is not None
    taken = share.taken(loaded.group.device)
    budget = share.nbytes - taken - steps.later - reserved
    if budget <= 0:
        raise EngineError(
            f"nothing is left for the KV cache: of its GPU's {share.total / 2**30:.1f} GiB rank {loaded.group.rank} "
            f"may take {share.nbytes / 2**30:.1f} (--gpu-memory-utilization {share.utilization}), but takes "
            f"{taken / 2**30:.1f} with {steps.weights / 2**30:.1f} of weights and {steps.activations / 2**30:.1f} of "
            f"activations, and {(steps.later + reserved) / 2**30:.1f} for CUDA graphs and sampling; raise it, or "
            f"lower --max-num-batched-tokens or --max-num-seqs"
        )
    return budget


def _run_largest(loaded: LoadedModel) -> None:
    """A prefill of the whole token budget, sampled at as many rows as can run."""
    settings = loaded.settings
    with torch.inference_mode():
        run_prompts(
            loaded,
            loaded.caches(1, 1),
            largest_prompts(loaded),
            min(settings.max_num_seqs, settings.max_num_batched_tokens),
        )


def largest_prompts(loaded: LoadedModel) -> list[int]:
    """Lengths of prompts that are all tokens that a step may have, as few prompts as can be."""
    tokens = loaded.settings.max_num_batched_tokens
    length = min(tokens, loaded.wanted_len)
    lens = [length] * (tokens // length)
    if tokens % length:
        lens.append(tokens % length)
    return lens


def run_prompts(
    loaded: LoadedModel,
    kv: Sequence[LayerKV | LayerState],
    lens: list[int],
    sampled: int,
    decodes: int = 0,
    cached: int = 0,
) -> Tensor:
    """Compute prompts of these lengths, of any tokens, behind so many decodes, and keep none of it: the logits of
    ``sampled`` rows. cached: tokens that the host takes to be before each of them, which are not read."""
    device = loaded.group.device
    lens = [1] * decodes + lens
    rows = torch.zeros(sampled, dtype=torch.int64, device=device)
    nowhere = torch.full((sum(lens),), -1, dtype=torch.int64, device=device)
    shape = len(loaded.layout.windows), len(lens), table_width(loaded, max(lens))
    tables = torch.zeros(shape, dtype=torch.int32, device=device)
    forward = ForwardBatch(
        input_ids=torch.zeros(sum(lens), dtype=torch.int64, device=device),
        rope_positions=torch.zeros(sum(lens), dtype=torch.int64, device=device),
        pools=tuple(PoolTables(nowhere, table) for table in tables),
        query_lens=lens,
        seq_lens=[cached + length for length in lens],
        num_decodes=decodes,
        logits_rows=rows,
        query_start_S1=torch.tensor([0, *np.cumsum(lens).tolist()], dtype=torch.int32, device=device),
        seq_lens_S=torch.tensor(lens, dtype=torch.int32, device=device),
        state_tables=_states(loaded, lens[decodes:], decodes),
    )
    model = loaded.model
    if model.mtp is None:
        return model(forward, kv, rows)  # type: ignore[no-any-return]
    final = model.final(forward, kv)
    assert final is not None
    states_TH = model.compute.normed(*final)
    logits: Tensor = model.lm_head(states_TH[rows])
    model.predict(states_TH, forward, loaded.predictor_cache(1), rows)
    return logits


def _chunk_bytes(loaded: LoadedModel) -> int:
    """What a chunk of a recurrent layer takes."""
    nets = state_sizes(loaded.config.blueprint, loaded.group.rank, loaded.group.size)
    size = loaded.dtype.itemsize
    each = (net_chunk_bytes(net.key_heads, net.value_heads, net.key_dim, net.value_dim, size) for net in nets)
    return max(each, default=0)


def _states(loaded: LoadedModel, lens: list[int], decodes: int) -> StateTables | None:
    """Prompts of these lengths behind so many decodes, in the same slot; and as many chunks as are computed at once at
    most, so that memory is taken for those."""
    if not loaded.state_bytes:
        return None
    device, starts = loaded.group.device, np.cumsum([decodes, *lens]).tolist()
    made = Chunks.of(NewTokens(start, length, 0, -1, 0) for start, length in zip(starts, lens, strict=False))
    first = made.groups[0]
    missing = max(0, MOST_NET_CHUNKS - first.chunks)
    tables = [torch.tensor(one, dtype=torch.int32, device=device) for one in (made.chunks, made.sequences)]
    if len(made.groups) == 1:
        tables[0] = torch.nn.functional.pad(tables[0], (0, missing))
        made.groups[0] = first._replace(chunks=first.chunks + missing)
    return StateTables(tables[0].new_full((NUMBERS, decodes), -1), ChunkTables(tables[0], tables[1], made.groups))
