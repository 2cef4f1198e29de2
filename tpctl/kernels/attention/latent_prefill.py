"""Causal attention of new tokens over a paged cache of latent vectors, absorbed: as `latent_decode`, of several tokens.

All heads of a token read the same rows, and so do neighbouring tokens: a tile of queries is so many rows [token, head]
in the order in which they lie in memory, whatever the number of heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.latent_decode import most_rows, row_width
from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import ANYWHERE, capability, shared_memory


@triton.jit(do_not_specialize=["num_seqs", "table_stride"], do_not_specialize_on_alignment=ANYWHERE)
def latent_prefill_kernel(
    q_ptr,
    cache_ptr,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sums_ptr,
    scale_log2e,
    num_seqs,
    table_stride,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    KEPT: tl.constexpr = RANK + ROPE
    slot = tl.program_id(0)
    # As in `paged_prefill`: sequence s owns the slots from its first row // BLOCK_M + s on.
    low = slot * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) * NUM_HEADS // BLOCK_M + middle <= slot:
            low = middle
        else:
            high = middle
    seq = low
    q_start = tl.load(query_start_ptr + seq)
    q_len = tl.load(query_start_ptr + seq + 1) - q_start
    index = slot - (q_start * NUM_HEADS // BLOCK_M + seq)
    num_rows = q_len * NUM_HEADS
    if (index < 0) | (index * BLOCK_M >= num_rows):  # before the first sequence; beyond its tiles
        return
    index = tl.cdiv(num_rows, BLOCK_M) - 1 - index  # the last rows see the most keys; start them first
    length = tl.load(seq_lens_ptr + seq)
    m = index * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_RANK)
    c = tl.arange(0, BLOCK_ROPE)
    in_rows = (m < num_rows)[:, None]
    row = q_start.to(tl.int64) * NUM_HEADS + m
    q_row = q_ptr + row[:, None] * KEPT
    q = tl.load(q_row + r[None, :], mask=in_rows & (r < RANK)[None, :], other=0.0)
    q_rope = tl.load(q_row + RANK + c[None, :], mask=in_rows & (c < ROPE)[None, :], other=0.0)
    context = length - q_len
    position = context + m // NUM_HEADS
    table = block_tables_ptr + seq.to(tl.int64) * table_stride

    last_position = tl.minimum(context + (index * BLOCK_M + BLOCK_M - 1) // NUM_HEADS, length - 1)
    col = tl.arange(0, TILE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_RANK], tl.float32)
    for tile in tl.range(0, last_position // TILE + 1, num_stages=STAGES):
        token = tile * TILE + col
        live = (token < length)[:, None]
        if BLOCK_SIZE >= TILE:
            block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
            rows = cache_ptr + (block * BLOCK_SIZE + tile * TILE % BLOCK_SIZE) * KEPT + (col * KEPT)[:, None]
        else:
            block = tl.load(table + token // BLOCK_SIZE, mask=token < length, other=0).to(tl.int64)
            rows = cache_ptr + ((block * BLOCK_SIZE + token % BLOCK_SIZE) * KEPT)[:, None]
        if BLOCK_RANK == RANK:
            latent = tl.load(rows + r[None, :], mask=live, other=0.0)
        else:
            latent = tl.load(rows + r[None, :], mask=live & (r < RANK)[None, :], other=0.0)
        key = tl.load(rows + RANK + c[None, :], mask=live & (c < ROPE)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(latent), input_precision="ieee")
        score = tl.dot(q_rope, tl.trans(key), score, input_precision="ieee") * scale_log2e
        score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))  # every row sees the first tile: finite from there on
        p = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        top = new_top
        acc = tl.dot(p.to(latent.dtype), latent, acc * fade[:, None], input_precision="ieee")
    out = (acc / weight[:, None]).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + row[:, None] * RANK + r[None, :], out, mask=in_rows & (r < RANK)[None, :])


class LatentPrefillConfig(NamedTuple):
    """block_m: rows of queries and heads a program. tile: keys at a time. num_stages: tiles in flight."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


def latent_prefill_config(rank: int, rope: int, itemsize: int, limit: int, most: int = 64) -> LatentPrefillConfig:
    """The configuration that takes at most ``limit`` bytes of shared memory. itemsize: bytes of a number. most: what
    `most_rows` says."""
    config = LatentPrefillConfig(16, 16, 4, 1) if itemsize == 4 else LatentPrefillConfig(most, 64, 8, 2)
    row = (row_width(rank) + row_width(rope)) * itemsize

    def taken() -> int:  # queries, tiles in flight, weights of a tile
        return (config.block_m + config.num_stages * config.tile) * row + config.block_m * config.tile * itemsize

    while taken() > limit:
        if config.tile > 16:
            config = config._replace(tile=config.tile // 2)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        else:
            break
    return config


def latent_prefill(
    q_TNC: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_S: torch.Tensor,
    rank: int,
    *,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over what is kept of its prefix and of themselves.

    q_TNC: [T, N, R + Q] contiguous, absorbed; sequence s owns rows query_start_loc[s] to query_start_loc[s + 1], which
    may be none. Rows before the first sequence's and behind the last one's are not touched. cache, block_tables: as of
    `latent_decode`, the new tokens already written. query_start_loc: int32 [S + 1]. seq_lens_S: int32 [S], cached
    prefix included. Returns [T, N, R], contiguous.
    """
    num_tokens, num_heads, kept = q_TNC.shape
    sums = q_TNC.new_empty(num_tokens, num_heads, rank) if out is None else out
    if num_tokens == 0:
        return sums
    num_seqs, rope = seq_lens_S.shape[0], kept - rank
    device = q_TNC.device
    config = latent_prefill_config(rank, rope, q_TNC.itemsize, shared_memory(device), most_rows(capability(device)))
    latent_prefill_kernel[(num_tokens * num_heads // config.block_m + num_seqs,)](
        q_TNC,
        cache,
        block_tables,
        query_start_loc,
        seq_lens_S,
        sums,
        scale * LOG2E.value,
        num_seqs,
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        RANK=rank,
        ROPE=rope,
        BLOCK_RANK=row_width(rank),
        BLOCK_ROPE=row_width(rope),
        BLOCK_SIZE=cache.shape[1],
        BLOCK_M=config.block_m,
        TILE=config.tile,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return sums
