"""The device code of `paged_decode` for a cache that is packed or in FP8.

It does as `decode_kernel`, but for how a tile is read and multiplied.

A query group is the narrow side of both products, keys [TILE, D] times queries [D, M] and values [D, TILE] times
weights [TILE, M]: M is 8 where `decode_kernel` pads to 16, and half as much arithmetic is left beside the unpacking.
One warp a program needs no barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.attention.fp8_kv import load_scales, numbers
from tpctl.kernels.attention.packed_kv import key_factor, load_exponents, unpack, value_factor
from tpctl.kernels.attention.tile_runs import (
    block_of,
    first_run,
    leave_partial,
    next_run,
    prefix_stats,
    shared_tiles,
    soft_capped,
    softmax_start,
    window_of,
)
from tpctl.kernels.common.prefetch import prefetch


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles", "table_stride"])
def packed_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    factors_ptr,  # exponents, or scales: a word a token
    block_tables_ptr,
    seq_lens_ptr,
    cu_tiles_ptr,
    first_seq_ptr,
    ahead_seq_ptr,
    partial_ptr,
    stats_ptr,
    counters_ptr,
    out_ptr,
    sinks_ptr,
    shared_ptr,  # tokens of a prefix that all sequences share, and what attending to it gave
    prefix_ptr,  # [S, N, D] float32
    prefix_stats_ptr,  # [S, N, 2]
    scale_log2e,
    num_seqs,
    num_programs,
    min_tiles,
    table_stride,
    q_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SHARED: tl.constexpr,
    FP8: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    ROW: tl.constexpr = HEAD_DIM if FP8 else HEAD_DIM + HALF
    m = tl.arange(0, BLOCK_M)  # the group's query heads, padded to what a dot needs
    d = tl.arange(0, HALF)
    col = tl.arange(0, TILE)
    q_mask = (m < GROUP)[None, :]
    head_offsets = (kv_head * GROUP + m)[None, :] * HEAD_DIM + d[:, None]
    tile_offsets = col[:, None] * ROW + d[None, :]

    share, run_start, run_end, first_seq, ahead, seq, seq_start, seq_end, length, tile = first_run(
        cu_tiles_ptr, first_seq_ptr, ahead_seq_ptr, seq_lens_ptr, program, num_seqs, num_programs, min_tiles, AHEAD
    )
    before = shared_tiles(shared_ptr, TILE, SHARED)
    stop = tl.where(ahead, tile, run_end)  # where what is left of the run ends
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if run_start < run_end:
            _prefetch(k_cache_ptr, v_cache_ptr, block_tables_ptr + seq.to(tl.int64) * table_stride, length, kv_head,
                      before + tile - seq_start, NUM_KV_HEADS, ROW, BLOCK_SIZE, TILE, WINDOW)  # fmt: skip
        tl.extra.cuda.gdc_wait()
    while ahead | (tile < stop):
        q_row = q_ptr + seq.to(tl.int64) * q_stride + head_offsets
        q_low = tl.load(q_row, mask=q_mask, other=0.0)
        q_high = tl.load(q_row + HALF, mask=q_mask, other=0.0)
        table = block_tables_ptr + seq.to(tl.int64) * table_stride
        window_start, window_tile = window_of(length, TILE, WINDOW)
        first_token = (window_tile + before + tile - seq_start) * TILE
        last = tl.minimum(run_end, seq_end)

        top, weight = softmax_start(sinks_ptr, kv_head, m, tile == seq_start, GROUP, BLOCK_M, SINKS)
        acc_low = tl.zeros([HALF, BLOCK_M], tl.float32)
        acc_high = tl.zeros([HALF, BLOCK_M], tl.float32)
        if SHARED:
            row = (seq * NUM_KV_HEADS + kv_head) * GROUP + m
            top, weight = prefix_stats(prefix_stats_ptr, row, (m < GROUP) & (tile == seq_start))
            found = prefix_ptr + row.to(tl.int64)[None, :] * HEAD_DIM + d[:, None]
            acc_low = tl.load(found, mask=q_mask & (tile == seq_start), other=0.0)
            acc_high = tl.load(found + HALF, mask=q_mask & (tile == seq_start), other=0.0)
        # The next tile's place and factors are read a tile ahead, so that its loads can be asked for before this
        # tile's are used.
        place = (block_of(table, first_token, length, BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
        next_place = place + first_token % BLOCK_SIZE
        next_factors = _load_factors(factors_ptr + next_place + col, FP8)
        for i in tl.range(0, last - tile, num_stages=STAGES):
            token0 = first_token + i * TILE
            token = token0 + col
            offsets = next_place * ROW + tile_offsets
            factors = next_factors
            place = (block_of(table, token0 + TILE, length, BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
            next_place = place + (token0 + TILE) % BLOCK_SIZE
            next_factors = _load_factors(factors_ptr + next_place + col, FP8)

            low = tl.load(k_cache_ptr + offsets)
            high = tl.load(k_cache_ptr + offsets + HALF)
            codes = low if FP8 else tl.load(k_cache_ptr + offsets + HEAD_DIM)
            k_low = _half(low, codes, False, True, FP8)
            score = tl.dot(k_low, q_low.to(k_low.dtype), input_precision="ieee")
            k_high = _half(high, codes, True, True, FP8)
            score = tl.dot(k_high, q_high.to(k_low.dtype), score, input_precision="ieee")
            score *= (key_factor(factors, FP8) * scale_log2e)[:, None]
            if SOFTCAP > 0:
                score = soft_capped(score, SOFTCAP)
            ok = token < length
            if WINDOW > 0:
                ok &= token >= window_start
            score = tl.where(ok[:, None], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 0))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(score - safe_top[None, :])
            fade = tl.exp2(top - safe_top)
            weight = weight * fade + tl.sum(p, 0)
            top = new_top
            low = tl.load(v_cache_ptr + offsets)
            high = tl.load(v_cache_ptr + offsets + HALF)
            codes = low if FP8 else tl.load(v_cache_ptr + offsets + HEAD_DIM)
            # A token beyond the length weighs nothing, whatever its bytes say.
            p = tl.where(ok[:, None], p * value_factor(factors, FP8)[:, None], 0.0)
            v_low = _half(low, codes, False, False, FP8)
            p = p.to(v_low.dtype)
            acc_low = tl.dot(tl.trans(v_low), p, acc_low * fade[None, :], input_precision="ieee")
            v_high = _half(high, codes, True, False, FP8)
            acc_high = tl.dot(tl.trans(v_high), p, acc_high * fade[None, :], input_precision="ieee")

        out_row = out_ptr + seq.to(tl.int64) * out_stride
        if (tile == seq_start) & (last == seq_end):
            norm = (1.0 / tl.where(weight > 0.0, weight, 1.0))[None, :]
            tl.store(out_row + head_offsets, (acc_low * norm).to(out_ptr.dtype.element_ty), mask=q_mask)
            tl.store(out_row + head_offsets + HALF, (acc_high * norm).to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            slot = program * 2 + (tile != run_start).to(tl.int32)
            slot_row = (slot * NUM_KV_HEADS + kv_head) * GROUP + m
            partial = partial_ptr + slot_row[None, :] * HEAD_DIM + d[:, None]
            tl.store(partial, acc_low, mask=q_mask)
            tl.store(partial + HALF, acc_high, mask=q_mask)
            leave_partial(partial_ptr, stats_ptr, counters_ptr, out_row, slot_row, top, weight, m, seq, seq_start,
                          seq_end, share, kv_head, NUM_KV_HEADS, GROUP, HEAD_DIM, HEAD_DIM, BLOCK_GROUP,
                          BLOCK_PARTS)  # fmt: skip
        seq, seq_start, seq_end, length, tile = next_run(
            cu_tiles_ptr, seq_lens_ptr, seq, ahead, last, run_start, first_seq, num_seqs, AHEAD
        )
        if AHEAD:
            ahead = tl.full([], False, tl.int1)


@triton.jit
def _load_factors(ptr, FP8: tl.constexpr):
    return load_scales(ptr) if FP8 else load_exponents(ptr)


@triton.jit
def _half(values, codes, HIGH: tl.constexpr, PURE: tl.constexpr, FP8: tl.constexpr):
    """One half of the vectors of a tile, without their factors."""
    return numbers(values, PURE) if FP8 else unpack(values, codes, HIGH, PURE)


@triton.jit
def _prefetch(
    k_cache_ptr,
    v_cache_ptr,
    table,
    length,
    kv_head,
    tile,
    NUM_KV_HEADS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Ask the L2 cache for a tile while the predecessor still runs; where it writes, the L2 cache stays coherent."""
    first_token = tile * TILE
    if WINDOW > 0:
        first_token += tl.maximum(length - WINDOW, 0) // TILE * TILE
    token = first_token + tl.arange(0, TILE)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < length, other=0).to(tl.int64)
    row = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE) * ROW
    for line in tl.static_range((ROW + 127) // 128):
        prefetch(k_cache_ptr + row + line * 128)
        prefetch(v_cache_ptr + row + line * 128)
