"""Causal attention of new tokens over a paged KV cache, sequences of any length packed in one batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.hopper_prefill import hopper_prefill, takes
from tpctl.kernels.attention.packed_kv import as_words, is_fp8, key_factor, load_vectors, value_factor
from tpctl.kernels.attention.reference import softcap_reference, softmax_reference
from tpctl.kernels.attention.tile_runs import LOG2E, soft_capped
from tpctl.kernels.common.launch import (
    ANYWHERE,
    is_hopper,
    launch_options,
    next_power_of_2,
    pipelines_pure_alone,
    shared_memory,
)


@triton.jit
def attend(
    acc,
    top,
    weight,
    q,
    k_cache_ptr,
    v_cache_ptr,
    factors_ptr,
    table,
    kv_head,
    length,
    q_position,
    first,
    last,
    scale_log2e,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,  # or in FP8
    FP8: tl.constexpr,
    PURE: tl.constexpr,  # as of `unpack`
    STAGES: tl.constexpr,
):
    """Fold the key tiles [first, last) into the running softmax; MASKED where causality, window or length can cut."""
    d = tl.arange(0, BLOCK_DIM)
    col = tl.arange(0, TILE)
    in_dim = (d < HEAD_DIM)[None, :]
    if SOFTCAP > 0:  # what a cap takes is scaled already
        unit = 1.0
    else:
        unit = scale_log2e
    for tile in tl.range(first, last, num_stages=STAGES):
        token0 = tile * TILE
        token = token0 + col
        live = token < length
        if BLOCK_SIZE >= TILE:
            block = tl.load(table + token0 // BLOCK_SIZE).to(tl.int64)
            place = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token0 % BLOCK_SIZE + col
            base = ((block * BLOCK_SIZE + token0 % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
            offsets = base + (col * (NUM_KV_HEADS * HEAD_DIM))[:, None] + d[None, :]
        else:
            if WINDOW > 0:  # blocks that no query's window reaches may be others' by now
                live &= token > tl.min(q_position, 0) - WINDOW
            block = tl.load(table + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
            place = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
            slot = block * BLOCK_SIZE + token % BLOCK_SIZE
            offsets = ((slot * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
        if PACKED:
            factors = tl.load(factors_ptr + place).to(tl.int32)
            if MASKED:  # an old factor behind the end may stand for infinity, which is not to be multiplied
                factors = tl.where(live, factors, 0)
            k = load_vectors(k_cache_ptr, place, HEAD_DIM, FP8, PURE)
        elif MASKED:
            k = tl.load(k_cache_ptr + offsets, mask=live[:, None] & in_dim, other=0.0)
        elif BLOCK_DIM == HEAD_DIM:
            k = tl.load(k_cache_ptr + offsets)
        else:
            k = tl.load(k_cache_ptr + offsets, mask=in_dim, other=0.0)
        score = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
        if PACKED:
            score *= key_factor(factors, FP8)[None, :]
        if SOFTCAP > 0:
            score = soft_capped(score * scale_log2e, SOFTCAP)
        if MASKED:
            ok = token[None, :] <= q_position[:, None]
            if WINDOW > 0:
                ok &= token[None, :] > q_position[:, None] - WINDOW
            score = tl.where(ok, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1) * unit)
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            new_top = tl.maximum(top, tl.max(score, 1) * unit)
            safe_top = new_top
        p = tl.exp2(score * unit - safe_top[:, None])
        fade = tl.exp2(top - safe_top)
        weight = weight * fade + tl.sum(p, 1)
        top = new_top
        if PACKED:
            v = load_vectors(v_cache_ptr, place, HEAD_DIM, FP8, PURE)
            p *= value_factor(factors, FP8)[None, :]
        elif MASKED:
            v = tl.load(v_cache_ptr + offsets, mask=live[:, None] & in_dim, other=0.0)
        elif BLOCK_DIM == HEAD_DIM:
            v = tl.load(v_cache_ptr + offsets)
        else:
            v = tl.load(v_cache_ptr + offsets, mask=in_dim, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, top, weight


@triton.jit(do_not_specialize=["num_seqs", "table_stride"], do_not_specialize_on_alignment=ANYWHERE)
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    factors_ptr,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    sinks_ptr,
    scale_log2e,
    num_seqs,
    table_stride,
    q_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PACKED: tl.constexpr,  # or in FP8
    FP8: tl.constexpr,
    PURE: tl.constexpr,  # as of `unpack`
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    slot = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Sequence s owns the slots from query_start[s] // BLOCK_M + s on: enough for its tiles, known without a
    # host count, and increasing in s. Find the last s that starts at or before this slot.
    low = slot * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_M + middle <= slot:
            low = middle
        else:
            high = middle
    seq = low
    q_start = tl.load(query_start_ptr + seq)
    q_len = tl.load(query_start_ptr + seq + 1) - q_start
    index = slot - (q_start // BLOCK_M + seq)
    if (index < 0) | (index * BLOCK_M >= q_len):  # before the first sequence; beyond its tiles
        return
    # The last rows see the most keys; start them first.
    index = tl.cdiv(q_len, BLOCK_M) - 1 - index
    length = tl.load(seq_lens_ptr + seq)
    m = index * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    q_mask = (m < q_len)[:, None] & (d < HEAD_DIM)[None, :]
    q_row = (q_start + m).to(tl.int64)
    q = tl.load(q_ptr + q_row[:, None] * q_stride + head * HEAD_DIM + d[None, :], mask=q_mask, other=0.0)
    context = length - q_len
    position = context + m
    table = block_tables_ptr + seq.to(tl.int64) * table_stride
    kv_head = head // GROUP

    # Tiles below the diagonal need no mask, unless a window cuts them on the left.
    first_position = context + index * BLOCK_M
    end = (tl.minimum(first_position + BLOCK_M, length) - 1) // TILE + 1
    start = 0
    full_end = (first_position + 1) // TILE
    if WINDOW > 0:
        start = tl.maximum(first_position - WINDOW + 1, 0) // TILE
        full_end = start

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        weight += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    if WINDOW == 0:
        acc, top, weight = attend(acc, top, weight, q, k_cache_ptr, v_cache_ptr, factors_ptr, table, kv_head, length,
                                  position, start, full_end, scale_log2e, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM,
                                  BLOCK_SIZE, TILE, WINDOW, SOFTCAP, False, PACKED, FP8, PURE, STAGES)  # fmt: skip
    acc, top, weight = attend(acc, top, weight, q, k_cache_ptr, v_cache_ptr, factors_ptr, table, kv_head,
                               length, position, full_end, end, scale_log2e, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM,
                               BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True, PACKED, FP8, PURE, STAGES)  # fmt: skip
    result = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
    out_offsets = q_row[:, None] * out_stride + head * HEAD_DIM + d[None, :]
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)


class PrefillConfig(NamedTuple):
    """block_m: queries a program. tile: keys at a time. num_stages: of the loop over tiles, in which a tile is read two
    stages after its place in the block table; of up to two stages, a tile early at most."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


_LONG = 8192
"""New tokens of a sequence from which on programs of 128 queries, of which there are fewer, win."""


def prefill_config(
    num_tokens: int, num_seqs: int, head_dim: int, block_size: int, itemsize: int, limit: int, hopper: bool = False
) -> PrefillConfig:
    """The tuned configuration for new tokens of so many sequences, made smaller where it takes more than ``limit``
    bytes of shared memory (wide heads, small devices). itemsize: bytes of an element. hopper: as `is_hopper`."""
    if itemsize == 4:
        config = PrefillConfig(32 if head_dim <= 256 else 16, 32, 4, 1)
    elif head_dim > 256:  # sums of 64 x 512 are half of all registers
        config = PrefillConfig(64, 32, 8, 2)
    elif num_tokens <= max(512, 64 * num_seqs):  # short chunks: do not pad them far
        config = PrefillConfig(64, 64, 4, 2)
    elif hopper and head_dim <= 128:  # two programs a multiprocessor, or one whose tiles are all in flight
        large = head_dim > 64 and block_size >= 128 and num_tokens >= _LONG * num_seqs
        config = PrefillConfig(128, 128, 8, 5) if large else PrefillConfig(64, 64, 4, 5)
    else:
        config = PrefillConfig(128, 64 if block_size < 128 else 128, 8, 2)

    row = next_power_of_2(head_dim) * itemsize
    return fitted(config, row, row, limit)


def fitted(config: PrefillConfig, key: int, value: int, limit: int) -> PrefillConfig:
    """``config`` made smaller where it takes more than ``limit`` bytes of shared memory. key, value: bytes of one; a
    query has a key's."""

    def taken() -> int:  # queries, and keys and values of the tiles in flight
        tiles = min(config.num_stages, max(2, (config.num_stages + 1) // 2))
        return config.block_m * key + tiles * config.tile * (key + value)

    while taken() > limit:
        if config.tile > 32:
            config = config._replace(tile=config.tile // 2)
        elif config.num_stages > 1:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        else:
            break
    return config


def paged_prefill(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_S: torch.Tensor,
    *,
    factors: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
    pairs: int | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its cached prefix and themselves.

    q_TND: [T, N, D], heads contiguous; sequence s owns rows query_start_loc[s] to query_start_loc[s + 1], which may
    be none. Rows before the first sequence's and behind the last one's are not touched.
    k_cache, v_cache: [num_blocks, B, K, D] contiguous, q's dtype; or, with exponents for factors, packed (`packed_kv`),
    or, with scales, in FP8 (`fp8_kv`); the new tokens already written.
    block_tables: int32 [S, max_blocks]. query_start_loc: int32 [S + 1]. seq_lens_S: int32 [S], cached prefix
    included; the last new token stands at seq_len - 1. window: tokens a query sees, itself included (None:
    all). softcap: a scaled score s becomes softcap * tanh(s / softcap). sinks_N: [N], scores that join the softmax of
    each head, with no value of their own. scale: default D ** -0.5. pairs: of a new token and one that it sees, over
    all sequences, where the host knows; much work has a kernel of its own (`hopper_prefill`). Returns [T, N, D].
    """
    num_tokens, num_heads, head_dim = q_TND.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    if factors is not None:
        block_size, num_kv_heads = num_kv_heads, block_size
    out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format) if out is None else out
    if num_tokens == 0:
        return out_TND
    num_seqs = seq_lens_S.shape[0]
    scale = head_dim**-0.5 if scale is None else scale
    plain = factors is None and sinks_N is None and not (window or softcap or pdl)
    if plain and pairs is not None and takes(q_TND, k_cache, pairs):
        return hopper_prefill(
            q_TND, k_cache, v_cache, block_tables, query_start_loc, seq_lens_S, scale=scale, out=out_TND
        )
    device, itemsize = q_TND.device, q_TND.element_size()
    config = prefill_config(
        num_tokens, num_seqs, head_dim, block_size, itemsize, shared_memory(device), is_hopper(device)
    )
    # One slot per full tile, and one more per sequence.
    slots = num_tokens // config.block_m + num_seqs
    _prefill_kernel[(num_heads, slots)](
        q_TND,
        k_cache,
        v_cache,
        k_cache if factors is None else as_words(factors),
        block_tables,
        query_start_loc,
        seq_lens_S,
        out_TND,
        q_TND if sinks_N is None else sinks_N,
        scale * LOG2E.value,
        num_seqs,
        block_tables.stride(0),
        q_TND.stride(0),
        out_TND.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        TILE=config.tile,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        SINKS=sinks_N is not None,
        PACKED=factors is not None,
        FP8=factors is not None and is_fp8(factors),
        PURE=pipelines_pure_alone(q_TND.device),
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    return out_TND


def paged_prefill_reference(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_S: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_prefill` in plain torch, one sequence at a time, computed in float32 (float64 for float64)."""
    num_heads, head_dim = q_TND.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    wide = torch.promote_types(q_TND.dtype, torch.float32)
    out_TND = torch.zeros_like(q_TND)
    starts = query_start_loc.tolist()
    for s, length in enumerate(seq_lens_S.tolist()):
        rows = slice(starts[s], starts[s + 1])
        q_len = starts[s + 1] - starts[s]
        blocks = block_tables[s, : -(-length // block_size)].long()
        k, v = (
            cache[blocks]
            .reshape(-1, num_kv_heads, head_dim)[:length]
            .to(wide)
            .repeat_interleave(num_heads // num_kv_heads, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("qnd,tnd->nqt", q_TND[rows].to(wide), k)
        position = torch.arange(length - q_len, length, device=q_TND.device)[:, None]
        key = torch.arange(length, device=q_TND.device)[None, :]
        seen = key <= position
        if window:
            seen &= key > position - window
        scores = softcap_reference(scores * (head_dim**-0.5 if scale is None else scale), softcap)
        scores = scores.masked_fill(~seen, float("-inf"))
        out_TND[rows] = torch.einsum("nqt,tnd->qnd", softmax_reference(scores, sinks_N), v).to(q_TND.dtype)
    return out_TND
