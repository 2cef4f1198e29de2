"""Attention of many sequences' newest tokens to a prefix that all of them share, read once for all.

Keys and values that each sequence would read for itself meet the queries of all, as rows of one matrix: what
memory would limit is limited by arithmetic. The result is not yet divided by its weights: `paged_decode` goes on from
it with what each sequence has for itself (as "cascade" attention does, FlashInfer, Ye et al. 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.packed_kv import as_words, is_fp8
from tpctl.kernels.attention.paged_prefill import attend, prefill_config
from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import launch_options, next_power_of_2, pipelines_pure_alone, shared_memory

PREFIX_STEP = 128
"""Tokens that tiles of any kernel divide, unless blocks are smaller and bound them."""


class SharedPrefix(NamedTuple):
    """tokens: int32 [1], of the prefix, a multiple of `PREFIX_STEP` and of the block size; fewer than the shortest
    sequence has. sums: float32 [S, N, D], values weighed by exp2(score - top). stats: float32 [S, N, 2], top, in powers
    of two, and the sum of weights."""

    tokens: torch.Tensor
    sums: torch.Tensor
    stats: torch.Tensor


@triton.jit
def _prefix_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    factors_ptr,
    table_ptr,  # of the first sequence
    shared_ptr,
    sums_ptr,
    stats_ptr,
    scale_log2e,
    num_seqs,
    q_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PACKED: tl.constexpr,  # or in FP8
    FP8: tl.constexpr,
    PURE: tl.constexpr,  # as of `unpack`
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    seq = m // GROUP
    row = seq * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP
    mask = seq < num_seqs
    shared = tl.load(shared_ptr)
    if PDL:  # the decode kernel that follows reads its plan before it waits
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = row % (NUM_KV_HEADS * GROUP)
    q_rows = q_ptr + seq.to(tl.int64) * q_stride + head * HEAD_DIM
    whole = mask[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_rows[:, None] + d[None, :], mask=whole, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    acc, top, weight = attend(acc, top, weight, q, k_cache_ptr, v_cache_ptr, factors_ptr, table_ptr, kv_head, shared, m,
                              0, shared // TILE, scale_log2e, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, 0,
                              SOFTCAP, False, PACKED, FP8, PURE, STAGES)  # fmt: skip
    at = row.to(tl.int64)
    tl.store(sums_ptr + at[:, None] * HEAD_DIM + d[None, :], acc, mask=whole)
    tl.store(stats_ptr + at * 2, top, mask=mask)
    tl.store(stats_ptr + at * 2 + 1, weight, mask=mask)


def attend_to_prefix(
    q_SND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    factors: torch.Tensor | None,
    block_tables: torch.Tensor,
    prefix: SharedPrefix,
    scale: float | None = None,
    softcap: float | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Fill `prefix.sums` and `prefix.stats`, whose `tokens` says how far the prefix reaches.

    q_SND, k_cache, v_cache, factors, scale: as of `paged_decode`. softcap: as of `DecodePlan`.
    block_tables: int32 [S, M]; the first row is read.
    """
    num_seqs, num_heads, head_dim = q_SND.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    if factors is not None:
        block_size, num_kv_heads = num_kv_heads, block_size
    limit = shared_memory(q_SND.device)
    config = prefill_config(num_seqs, num_seqs, head_dim, block_size, q_SND.element_size(), limit)
    _prefix_kernel[(num_kv_heads, triton.cdiv(num_seqs * (num_heads // num_kv_heads), config.block_m))](
        q_SND,
        k_cache,
        v_cache,
        k_cache if factors is None else as_words(factors),
        block_tables,
        prefix.tokens,
        prefix.sums,
        prefix.stats,
        (head_dim**-0.5 if scale is None else scale) * LOG2E.value,
        num_seqs,
        q_SND.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_DIM=next_power_of_2(head_dim),
        TILE=config.tile,
        PACKED=factors is not None,
        FP8=factors is not None and is_fp8(factors),
        PURE=pipelines_pure_alone(q_SND.device),
        SOFTCAP=softcap or 0.0,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
