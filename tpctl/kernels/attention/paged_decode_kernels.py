"""The device code of `paged_decode`: how a step's work is divided, and a program's run of tiles."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from tpctl.kernels.common.prefetch import prefetch

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no assembly


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles"])
def plan_kernel(
    seq_lens_ptr,
    cu_tiles_ptr,
    first_seq_ptr,
    ahead_seq_ptr,
    num_seqs,
    num_programs,
    min_tiles,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    seq = tl.arange(0, BLOCK_SEQS)
    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    tiles = tl.cdiv(length, TILE)
    if WINDOW > 0:
        tiles -= tl.maximum(length - WINDOW, 0) // TILE
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(cu_tiles_ptr + seq, ends - tiles, mask=seq < num_seqs)
        tl.store(cu_tiles_ptr + num_seqs, total)
    program = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    share = tl.maximum(tl.cdiv(total, num_programs), min_tiles)
    start = program * share
    end = tl.minimum(start + share, total)
    first = tl.sum((ends[None, :] <= start[:, None]).to(tl.int32), 1)
    last = tl.sum((ends[None, :] < end[:, None]).to(tl.int32), 1)
    goes_on = tl.sum((ends[None, :] <= end[:, None]).to(tl.int32), 1) == last
    tl.store(first_seq_ptr + program, tl.minimum(first, num_seqs - 1), mask=program < num_programs)
    tl.store(ahead_seq_ptr + program, tl.where(goes_on & (last > first), last, -1), mask=program < num_programs)


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

    total = tl.load(cu_tiles_ptr + num_seqs)
    first_seq = tl.load(first_seq_ptr + program)
    share = tl.maximum(tl.cdiv(total, num_programs), min_tiles)
    run_start = program * share
    run_end = tl.minimum(run_start + share, total)
    seq = first_seq
    if AHEAD:  # the run's last sequence, where it goes on in the next run, comes before all others
        ahead_seq = tl.load(ahead_seq_ptr + program)
        seq = tl.where(ahead_seq < 0, seq, ahead_seq)
    seq_start = tl.load(cu_tiles_ptr + seq)
    seq_end = tl.load(cu_tiles_ptr + seq + 1)
    length = tl.load(seq_lens_ptr + seq)
    tile = run_start
    ahead = False
    if AHEAD:
        ahead = ahead_seq >= 0
        tile = tl.where(ahead, seq_start, tile)
    stop = tl.where(ahead, tile, run_end)  # where what is left of the run ends
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if run_start < run_end:
            _prefetch(k_cache_ptr, v_cache_ptr, block_tables_ptr + seq.to(tl.int64) * table_stride, length, kv_head,
                      tile - seq_start, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WINDOW)  # fmt: skip
        tl.extra.cuda.gdc_wait()
    while ahead | (tile < stop):
        q = tl.load(q_ptr + seq.to(tl.int64) * q_stride + head_offsets, mask=q_mask, other=0.0)
        table = block_tables_ptr + seq.to(tl.int64) * table_stride
        window_start = 0
        if WINDOW > 0:
            window_start = tl.maximum(length - WINDOW, 0)
        first_token = (window_start // TILE + tile - seq_start) * TILE
        last = tl.minimum(run_end, seq_end)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        if BLOCK_SIZE >= TILE:
            block = _block_of(table, first_token, length, BLOCK_SIZE)
        for i in tl.range(0, last - tile, num_stages=STAGES):
            token0 = first_token + i * TILE
            token = token0 + col
            live = token < length
            if BLOCK_SIZE >= TILE:
                base = ((block * BLOCK_SIZE + token0 % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
                offsets = base + tile_offsets
                # The next tile's block, so that its loads can be asked for before this tile's are used.
                block = _block_of(table, token0 + TILE, length, BLOCK_SIZE)
            else:
                block = tl.load(table + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
                slot = block * BLOCK_SIZE + token % BLOCK_SIZE
                offsets = ((slot * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
            if BLOCK_DIM == HEAD_DIM:
                k = tl.load(k_cache_ptr + offsets, mask=live[:, None], other=0.0)
            else:
                k = tl.load(k_cache_ptr + offsets, mask=live[:, None] & in_dim[None, :], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
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
            tl.store(stats_ptr + slot_row * 2, top, mask=m < GROUP)
            tl.store(stats_ptr + slot_row * 2 + 1, weight, mask=m < GROUP)
            first_part = seq_start // share
            num_parts = (seq_end - 1) // share - first_part + 1
            tl.debug_barrier()
            counter = counters_ptr + seq * NUM_KV_HEADS + kv_head
            done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if done == num_parts - 1:
                tl.store(counter, 0)
                first_slot = (seq_start != first_part * share).to(tl.int32)
                _combine(partial_ptr, stats_ptr, out_row, kv_head, first_part, num_parts, first_slot, NUM_KV_HEADS,
                         GROUP, HEAD_DIM, BLOCK_DIM, BLOCK_GROUP, BLOCK_PARTS)  # fmt: skip
        tile = last
        seq += 1
        seq_start = last
        if AHEAD:
            tile = tl.where(ahead, run_start, tile)
            seq = tl.where(ahead, first_seq, seq)
            seq_start = tl.load(cu_tiles_ptr + seq)
            ahead = tl.full([], False, tl.int1)
        more = seq < num_seqs
        seq_end = tl.load(cu_tiles_ptr + seq + 1, mask=more, other=0)
        length = tl.load(seq_lens_ptr + seq, mask=more, other=0)


@triton.jit
def _block_of(table, token, length, BLOCK_SIZE: tl.constexpr):
    """The KV block that holds `token`, or the sequence's last one.

    Not a `tl.load`: that would become part of the loop's pipeline, and the keys and values, whose addresses wait for
    it, could then not be asked for ahead of their use.
    """
    entry = table + tl.maximum(tl.minimum(token, length - 1), 0) // BLOCK_SIZE
    if _INTERPRETED:
        block = tl.load(entry)
    else:
        block = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [entry], dtype=tl.int32, is_pure=True, pack=1
        )
    return block.to(tl.int64)


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


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    out_row,
    kv_head,
    first_part,
    num_parts,
    first_slot,  # the slot that the first part's program used; all others used slot 0
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    part = tl.arange(0, BLOCK_PARTS)
    row = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_DIM)
    top = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        index = start + part
        slot = (first_part + index) * 2 + tl.where(index == 0, first_slot, 0)
        slot_row = ((slot * NUM_KV_HEADS + kv_head) * GROUP)[:, None] + row[None, :]
        live = (index < num_parts)[:, None] & (row < GROUP)[None, :]
        parts = tl.load(
            partial_ptr + slot_row[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=live[:, :, None] & (d < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        tops = tl.load(stats_ptr + slot_row * 2, mask=live, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(stats_ptr + slot_row * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        factors = tl.exp2(tops - safe_top[None, :])
        fade = tl.exp2(top - safe_top)
        weight = weight * fade + tl.sum(weights * factors, 0)
        acc = acc * fade[:, None] + tl.sum(parts * factors[:, :, None], 0)
        top = new_top
    result = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
    out_ptrs = out_row + (kv_head * GROUP + row)[:, None] * HEAD_DIM + d[None, :]
    mask = (row < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptrs, result.to(out_row.dtype.element_ty), mask=mask)
