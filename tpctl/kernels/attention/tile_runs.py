"""How a decode step's tiles are divided among programs, and a program's walk over its run of them.

`paged_decode` draws the line of tiles. A run that covers a whole sequence writes its output; of any other sequence it
leaves a partial result, and the program that finishes the sequence last combines them.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no assembly


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles"])
def plan_kernel(
    seq_lens_ptr,
    shared_ptr,  # tokens of a prefix that all share, and where they are kept
    kept_ptr,
    cu_tiles_ptr,
    first_seq_ptr,
    ahead_seq_ptr,
    num_seqs,
    num_programs,
    min_tiles,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    seq = tl.arange(0, BLOCK_SEQS)
    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    tiles = tl.cdiv(length, TILE)
    if WINDOW > 0:
        tiles -= tl.maximum(length - WINDOW, 0) // TILE
    if SHARED:
        shared = tl.load(shared_ptr)
        tl.store(kept_ptr, shared)
        tiles = tl.maximum(tiles - shared // TILE, 0)
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


@triton.jit
def first_run(
    cu_tiles_ptr,
    first_seq_ptr,
    ahead_seq_ptr,
    seq_lens_ptr,
    program,
    num_seqs,
    num_programs,
    min_tiles,
    AHEAD: tl.constexpr,
):
    """A program's run of tiles, [run_start, run_end) of shares of equal length, and where its walk begins.

    Returns the share, run_start, run_end, the run's first sequence and whether another one comes before it; then of the
    sequence to begin with its number, its tiles [seq_start, seq_end), its tokens, and the first tile to read. With
    AHEAD the run's last sequence, where it goes on in the next run, comes before all others.
    """
    total = tl.load(cu_tiles_ptr + num_seqs)
    first_seq = tl.load(first_seq_ptr + program)
    share = tl.maximum(tl.cdiv(total, num_programs), min_tiles)
    run_start = program * share
    run_end = tl.minimum(run_start + share, total)
    seq = first_seq
    if AHEAD:
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
    return share, run_start, run_end, first_seq, ahead, seq, seq_start, seq_end, length, tile


@triton.jit
def next_run(cu_tiles_ptr, seq_lens_ptr, seq, ahead, last, run_start, first_seq, num_seqs, AHEAD: tl.constexpr):
    """The sequence that a program goes on with after `seq`, whose tiles it has read up to `last`: what `first_run`
    says of one. ahead: whether `seq` was computed before all others."""
    tile = last
    seq += 1
    seq_start = last
    if AHEAD:
        tile = tl.where(ahead, run_start, tile)
        seq = tl.where(ahead, first_seq, seq)
        seq_start = tl.load(cu_tiles_ptr + seq)
    more = seq < num_seqs
    seq_end = tl.load(cu_tiles_ptr + seq + 1, mask=more, other=0)
    length = tl.load(seq_lens_ptr + seq, mask=more, other=0)
    return seq, seq_start, seq_end, length, tile


@triton.jit
def window_of(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first token that a sequence's newest one attends to, and the tile that it lies in."""
    start = 0
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    return start, start // TILE


@triton.jit
def shared_tiles(shared_ptr, TILE: tl.constexpr, SHARED: tl.constexpr):
    """Tiles of the prefix that all sequences share, before a sequence's first one."""
    tiles = 0
    if SHARED:
        tiles = tl.load(shared_ptr) // TILE
    return tiles


@triton.jit
def softmax_start(sinks_ptr, kv_head, m, begins, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, SINKS: tl.constexpr):
    """Top score, times log2(e), and sum of weights [M] of a query group before its first tile. begins: the tiles to
    come are the sequence's first, with which its sinks are counted."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        sinks = tl.load(sinks_ptr + kv_head * GROUP + m, mask=(m < GROUP) & begins, other=float("-inf"))
        top = sinks.to(tl.float32) * LOG2E
        weight += tl.where(begins, 1.0, 0.0)
    return top, weight


@triton.jit
def soft_capped(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(s / SOFTCAP) of scores s, what is given and what is returned times log2(e)."""
    TOP: tl.constexpr = SOFTCAP * LOG2E
    return TOP - 2.0 * TOP / (1.0 + tl.exp2(scores * (2.0 / SOFTCAP)))


@triton.jit
def prefix_stats(stats_ptr, row, begins):
    """Top score and sum of weights [M] of what a shared prefix gave, with which a sequence's first tiles begin."""
    top = tl.load(stats_ptr + row * 2, mask=begins, other=float("-inf"))
    weight = tl.load(stats_ptr + row * 2 + 1, mask=begins, other=0.0)
    return top, weight


@triton.jit
def leave_partial(
    partial_ptr,
    stats_ptr,
    counters_ptr,
    out_row,
    slot_row,  # [M], where the group's sums lie, which have been stored
    top,
    weight,
    m,
    seq,
    seq_start,
    seq_end,
    share,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Store the rest of a partial result; the program that comes last combines the sequence's partials."""
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
        _combine(partial_ptr, stats_ptr, out_row, kv_head, first_part, num_parts, first_slot, NUM_KV_HEADS, GROUP,
                 HEAD_DIM, BLOCK_DIM, BLOCK_GROUP, BLOCK_PARTS)  # fmt: skip


@triton.jit
def block_of(table, token, length, BLOCK_SIZE: tl.constexpr):
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
