"""The device code of `paged_decode`: attention of a program's run of tiles over keys and values as they are."""

from __future__ import annotations

import triton
import triton.language as tl

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
def decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
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
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SHARED: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    m = tl.arange(0, BLOCK_M)  # the group's query heads, padded to what a dot needs
    d = tl.arange(0, BLOCK_DIM)
    col = tl.arange(0, TILE)
    in_dim = d < HEAD_DIM
    q_mask = (m < GROUP)[:, None] & in_dim[None, :]
    head_offsets = (kv_head * GROUP + m)[:, None] * HEAD_DIM + d[None, :]
    tile_offsets = (col * (NUM_KV_HEADS * HEAD_DIM))[:, None] + d[None, :]

    share, run_start, run_end, first_seq, ahead, seq, seq_start, seq_end, length, tile = first_run(
        cu_tiles_ptr, first_seq_ptr, ahead_seq_ptr, seq_lens_ptr, program, num_seqs, num_programs, min_tiles, AHEAD
    )
    before = shared_tiles(shared_ptr, TILE, SHARED)
    stop = tl.where(ahead, tile, run_end)  # where what is left of the run ends
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if run_start < run_end:
            _prefetch(k_cache_ptr, v_cache_ptr, block_tables_ptr + seq.to(tl.int64) * table_stride, length, kv_head,
                      before + tile - seq_start, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WINDOW)  # fmt: skip
        tl.extra.cuda.gdc_wait()
    while ahead | (tile < stop):
        q = tl.load(q_ptr + seq.to(tl.int64) * q_stride + head_offsets, mask=q_mask, other=0.0)
        table = block_tables_ptr + seq.to(tl.int64) * table_stride
        window_start, window_tile = window_of(length, TILE, WINDOW)
        first_token = (window_tile + before + tile - seq_start) * TILE
        last = tl.minimum(run_end, seq_end)

        top, weight = softmax_start(sinks_ptr, kv_head, m, tile == seq_start, GROUP, BLOCK_M, SINKS)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        if SHARED:
            row = (seq * NUM_KV_HEADS + kv_head) * GROUP + m
            top, weight = prefix_stats(prefix_stats_ptr, row, (m < GROUP) & (tile == seq_start))
            found = prefix_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
            acc = tl.load(found, mask=q_mask & (tile == seq_start), other=0.0)
        if BLOCK_SIZE >= TILE:
            block = block_of(table, first_token, length, BLOCK_SIZE)
        for i in tl.range(0, last - tile, num_stages=STAGES):
            token0 = first_token + i * TILE
            token = token0 + col
            live = token < length
            if BLOCK_SIZE >= TILE:
                base = ((block * BLOCK_SIZE + token0 % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
                offsets = base + tile_offsets
                # The next tile's block, so that its loads can be asked for before this tile's are used.
                block = block_of(table, token0 + TILE, length, BLOCK_SIZE)
            else:
                if WINDOW > 0:  # blocks before the window's may be others' by now
                    live &= token >= window_start
                block = tl.load(table + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
                slot = block * BLOCK_SIZE + token % BLOCK_SIZE
                offsets = ((slot * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
            if BLOCK_DIM == HEAD_DIM:
                k = tl.load(k_cache_ptr + offsets, mask=live[:, None], other=0.0)
            else:
                k = tl.load(k_cache_ptr + offsets, mask=live[:, None] & in_dim[None, :], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
            if SOFTCAP > 0:
                score = soft_capped(score, SOFTCAP)
            ok = live
            if WINDOW > 0:
                ok &= token >= window_start
            score = tl.where(ok[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(score - safe_top[:, None])
            fade = tl.exp2(top - safe_top)
            weight = weight * fade + tl.sum(p, 1)
            top = new_top
            if BLOCK_DIM == HEAD_DIM:
                v = tl.load(v_cache_ptr + offsets, mask=live[:, None], other=0.0)
            else:
                v = tl.load(v_cache_ptr + offsets, mask=live[:, None] & in_dim[None, :], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")

        out_row = out_ptr + seq.to(tl.int64) * out_stride
        if (tile == seq_start) & (last == seq_end):
            result = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
            tl.store(out_row + head_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            slot = program * 2 + (tile != run_start).to(tl.int32)
            slot_row = (slot * NUM_KV_HEADS + kv_head) * GROUP + m
            tl.store(partial_ptr + slot_row[:, None] * HEAD_DIM + d[None, :], acc, mask=q_mask)
            leave_partial(partial_ptr, stats_ptr, counters_ptr, out_row, slot_row, top, weight, m, seq, seq_start,
                          seq_end, share, kv_head, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_DIM, BLOCK_GROUP,
                          BLOCK_PARTS)  # fmt: skip
        seq, seq_start, seq_end, length, tile = next_run(
            cu_tiles_ptr, seq_lens_ptr, seq, ahead, last, run_start, first_seq, num_seqs, AHEAD
        )
        if AHEAD:
            ahead = tl.full([], False, tl.int1)


@triton.jit
def _prefetch(
    k_cache_ptr,
    v_cache_ptr,
    table,
    length,
    kv_head,
    tile,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Ask the L2 cache for a tile while the predecessor still runs; where it writes, the L2 cache stays coherent."""
    LINE: tl.constexpr = 128 // k_cache_ptr.dtype.element_ty.itemsize
    LINES: tl.constexpr = HEAD_DIM // LINE if HEAD_DIM >= LINE else 1
    first_token = tile * TILE
    if WINDOW > 0:
        first_token += tl.maximum(length - WINDOW, 0) // TILE * TILE
    token = first_token + tl.arange(0, TILE)
    live = token < length
    block = tl.load(table + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    row = ((block * BLOCK_SIZE + token % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    for line in tl.static_range(LINES):
        for cache in tl.static_range(2):
            prefetch((v_cache_ptr if cache else k_cache_ptr) + row + line * LINE)
