"""The device code of `latent_decode`: a program's run of tiles for some heads, and the sum of a sequence's parts."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.attention.tile_runs import block_of, first_run, next_run
from tpctl.kernels.common.prefetch import prefetch


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles", "table_stride"])
def latent_decode_kernel(
    q_ptr,
    cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    cu_tiles_ptr,
    first_seq_ptr,
    partial_ptr,
    stats_ptr,
    sums_ptr,
    scale_log2e,
    num_seqs,
    num_programs,
    min_tiles,
    table_stride,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # heads, padded to what a dot needs
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    KEPT: tl.constexpr = RANK + ROPE
    GROUPS: tl.constexpr = (NUM_HEADS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0) // GROUPS
    head = tl.program_id(0) % GROUPS * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_RANK)
    c = tl.arange(0, BLOCK_ROPE)
    col = tl.arange(0, TILE)
    in_head = (head < NUM_HEADS)[:, None]
    in_rank = (r < RANK)[None, :]
    in_rope = (c < ROPE)[None, :]

    _, run_start, run_end, first_seq, ahead, seq, seq_start, seq_end, length, tile = first_run(
        cu_tiles_ptr, first_seq_ptr, first_seq_ptr, seq_lens_ptr, program, num_seqs, num_programs, min_tiles, False
    )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if run_start < run_end:
            _prefetch(cache_ptr, block_tables_ptr + seq.to(tl.int64) * table_stride, length, tile - seq_start, KEPT,
                      BLOCK_SIZE, TILE)  # fmt: skip
        tl.extra.cuda.gdc_wait()
    while tile < run_end:
        q_row = q_ptr + (seq.to(tl.int64) * NUM_HEADS + head)[:, None] * KEPT
        q = tl.load(q_row + r[None, :], mask=in_head & in_rank, other=0.0)
        q_rope = tl.load(q_row + RANK + c[None, :], mask=in_head & in_rope, other=0.0)
        table = block_tables_ptr + seq.to(tl.int64) * table_stride
        first_token = (tile - seq_start) * TILE
        last = tl.minimum(run_end, seq_end)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_RANK], tl.float32)
        if BLOCK_SIZE >= TILE:
            block = block_of(table, first_token, length, BLOCK_SIZE)
        for i in tl.range(0, last - tile, num_stages=STAGES):
            token0 = first_token + i * TILE
            token = token0 + col
            live = (token < length)[:, None]
            if BLOCK_SIZE >= TILE:
                rows = cache_ptr + (block * BLOCK_SIZE + token0 % BLOCK_SIZE) * KEPT + (col * KEPT)[:, None]
                # The next tile's block, so that its loads can be asked for before this tile's are used.
                block = block_of(table, token0 + TILE, length, BLOCK_SIZE)
            else:
                slot = tl.load(table + token // BLOCK_SIZE, mask=token < length, other=0).to(tl.int64) * BLOCK_SIZE
                rows = cache_ptr + ((slot + token % BLOCK_SIZE) * KEPT)[:, None]
            if BLOCK_RANK == RANK:
                latent = tl.load(rows + r[None, :], mask=live, other=0.0)
            else:
                latent = tl.load(rows + r[None, :], mask=live & in_rank, other=0.0)
            key = tl.load(rows + RANK + c[None, :], mask=live & in_rope, other=0.0)
            score = tl.dot(q, tl.trans(latent), input_precision="ieee")
            score = tl.dot(q_rope, tl.trans(key), score, input_precision="ieee") * scale_log2e
            score = tl.where((token < length)[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))  # a tile has at least one token: finite, or of no use
            p = tl.exp2(score - new_top[:, None])
            fade = tl.exp2(top - new_top)
            weight = weight * fade + tl.sum(p, 1)
            top = new_top
            acc = tl.dot(p.to(latent.dtype), latent, acc * fade[:, None], input_precision="ieee")

        if (tile == seq_start) & (last == seq_end):
            sums = sums_ptr + (seq.to(tl.int64) * NUM_HEADS + head)[:, None] * RANK
            tl.store(sums + r[None, :], (acc / weight[:, None]).to(sums_ptr.dtype.element_ty), mask=in_head & in_rank)
        else:
            row = (program * 2 + (tile != run_start).to(tl.int32)) * NUM_HEADS + head
            tl.store(partial_ptr + row[:, None] * RANK + r[None, :], acc, mask=in_head & in_rank)
            tl.store(stats_ptr + row * 2, top, mask=head < NUM_HEADS)
            tl.store(stats_ptr + row * 2 + 1, weight, mask=head < NUM_HEADS)
        seq, seq_start, seq_end, length, tile = next_run(
            cu_tiles_ptr, seq_lens_ptr, seq, ahead, last, run_start, first_seq, num_seqs, False
        )


@triton.jit
def _prefetch(cache_ptr, table, length, tile, KEPT: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Ask the L2 cache for a tile while the predecessor still runs; where it writes, the L2 cache stays coherent."""
    LINE: tl.constexpr = 128 // cache_ptr.dtype.element_ty.itemsize
    LINES: tl.constexpr = (KEPT + LINE - 1) // LINE
    token = tile * TILE + tl.arange(0, TILE)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < length, other=0).to(tl.int64)
    row = (block * BLOCK_SIZE + token % BLOCK_SIZE) * KEPT
    for line in tl.static_range(LINES):
        prefetch(cache_ptr + row + tl.minimum(line * LINE, KEPT - 1))


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles"])
def latent_combine_kernel(
    partial_ptr,
    stats_ptr,
    cu_tiles_ptr,
    sums_ptr,
    num_seqs,
    num_programs,
    min_tiles,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    seq = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.load(cu_tiles_ptr + num_seqs)
    start = tl.load(cu_tiles_ptr + seq)
    end = tl.load(cu_tiles_ptr + seq + 1)
    share = tl.maximum(tl.cdiv(total, num_programs), min_tiles)
    first_part = start // share
    num_parts = (end - 1) // share - first_part + 1
    if (end <= start) | (num_parts <= 1):  # no work, or a program has had all of it
        return
    first_slot = (start != first_part * share).to(tl.int32)  # all but the first part's program used slot 0
    part = tl.arange(0, BLOCK_PARTS)
    top = -float("inf")
    weight = 0.0
    acc = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, num_parts, BLOCK_PARTS):
        index = begin + part
        live = index < num_parts
        row = ((first_part + index) * 2 + tl.where(index == 0, first_slot, 0)) * NUM_HEADS + head
        tops = tl.load(stats_ptr + row * 2, mask=live, other=float("-inf"))
        weights = tl.load(stats_ptr + row * 2 + 1, mask=live, other=0.0)
        parts = tl.load(
            partial_ptr + row[:, None] * RANK + n[None, :], mask=live[:, None] & (n < RANK)[None, :], other=0.0
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        factors = tl.exp2(tops - new_top)
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(weights * factors, 0)
        acc = acc * fade + tl.sum(parts * factors[:, None], 0)
        top = new_top
    out = sums_ptr + (seq.to(tl.int64) * NUM_HEADS + head) * RANK + n
    tl.store(out, (acc / weight).to(sums_ptr.dtype.element_ty), mask=n < RANK)
