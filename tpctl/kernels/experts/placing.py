"""Pairs (token, slot) in the order of their experts, and the tiles that grouped GEMMs are made of; all on the device.

Pair p = t * K + s is slot s of token t. The pairs of an expert stand together, in their own order:

    pairs   | expert 0: 3 17 20 | expert 2: 1 5 6 8 9 | expert 3: 2 |
    tiles   |---|               |-------|-------|     |-|              of BLOCK_M pairs at most, each of one expert

How many tiles there are depends on the choice, how many there may be does not: a tile that is none has the expert -1.
A pair's place is found by counting, with no sums in an order of chance: pairs of smaller experts, and those of its own
expert before it. Up to `FEW` pairs there is a program for each expert, which counts both for its own; above, a first
launch counts by chunks.

The tiles of expert e begin at the tile  e + floor(pairs before its own / BLOCK_M):  a place that needs no other
expert's number of tiles, and leaves room for as many as its pairs may make.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import launch_options, next_power_of_2

FEW = 16384
"""Most pairs of one launch. On an H200 it takes 4.4 us for 2,176 pairs of 128 experts and 5.7 for 4,096; two launches
took 64 for 16,384."""
CHUNK = 4096  # pairs that are counted apart: a program goes through those of its own chunk
_BLOCK = 64  # pairs and tiles of a program
_STEP = 128  # pairs that each of them is held against together
_COUNTED = 1024  # pairs that are counted together


class Placed(NamedTuple):
    """pairs: int32 [P], as far as they have an expert here. tiles: int32 [N, 3], expert, start in pairs, length."""

    pairs: torch.Tensor
    tiles: torch.Tensor


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """How many tiles there may be, those that are none among them."""
    if pairs <= FEW:
        return experts + pairs // block_m
    used = min(pairs, experts)  # all of them but for the last with one pair too many for their tiles
    return max(1, (pairs - used) // block_m + used)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _place_few_kernel(
    ids_ptr,
    pairs_ptr,
    tiles_ptr,
    pairs,
    tiles,
    first,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """The pairs and the tiles of one expert here; those of the last one are followed by tiles that are none."""
    expert, count = tl.program_id(0), tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    before = tl.zeros([STEP], tl.int32)
    for p0 in range(0, pairs, STEP):
        p = p0 + tl.arange(0, STEP)
        other = tl.load(ids_ptr + p, mask=p < pairs, other=-1) - first
        before += ((other >= 0) & (other < expert)).to(tl.int32)
    start = tl.sum(before, 0)
    stop = start
    for p0 in range(0, pairs, STEP):
        p = p0 + tl.arange(0, STEP)
        mine = tl.load(ids_ptr + p, mask=p < pairs, other=first - 1) == first + expert
        place = stop + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs_ptr + place, p, mask=mine)
        stop += tl.sum(mine.to(tl.int32), 0)
    tile = expert + start // BLOCK_M
    end = expert + 1 + stop // BLOCK_M
    if expert == count - 1:
        end = tiles
    for t0 in range(tile, end, 64):
        t = t0 + tl.arange(0, 64)
        done = (t - tile) * BLOCK_M
        there = done < stop - start
        at = tiles_ptr + 3 * t
        tl.store(at, tl.where(there, expert, -1), mask=t < end)
        tl.store(at + 1, start + done, mask=(t < end) & there)
        tl.store(at + 2, tl.minimum(stop - start - done, BLOCK_M), mask=(t < end) & there)


@triton.jit
def _expert_of(ids_ptr, p, ok, first, count):
    """Numbers of experts here, from 0; -1 for those of other ranks."""
    expert = tl.load(ids_ptr + p, mask=ok, other=-1) - first
    return tl.where(ok & (expert >= 0) & (expert < count), expert, -1)


@triton.jit
def _count_pairs(ids_ptr, start, stop, first, count, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """Pairs of each expert among those from `start` on before `stop`, int32 [EXPERTS]."""
    total = tl.zeros([EXPERTS], tl.int32)
    for q0 in range(start, stop, STEP):
        q = q0 + tl.arange(0, STEP)
        expert = _expert_of(ids_ptr, q, q < stop, first, count)
        total += tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)
    return total


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(
    ids_ptr,
    counts_ptr,
    pairs,
    first,
    count,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    chunk = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    stop = tl.minimum(pairs, (chunk + 1) * CHUNK)
    total = _count_pairs(ids_ptr, chunk * CHUNK, stop, first, count, EXPERTS, STEP)
    tl.store(counts_ptr + chunk * EXPERTS + tl.arange(0, EXPERTS), total)


@triton.jit
def _pick(values, index, EXPERTS: tl.constexpr):
    """values[index], 0 for an index that is none of 0 to EXPERTS."""
    same = index[:, None] == tl.arange(0, EXPERTS)[None, :]
    return tl.sum(tl.where(same, values[None, :], 0), 1)


@triton.jit(do_not_specialize=["pairs", "tiles", "chunks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    tiles_ptr,
    pairs,
    tiles,
    first,
    count,
    chunks,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    chunk = block * BLOCK // CHUNK
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for other in range(chunks):
        counted = tl.load(counts_ptr + other * EXPERTS + tl.arange(0, EXPERTS))
        total += counted
        before += tl.where(other < chunk, counted, 0)
    starts = tl.cumsum(total, 0) - total
    p = block * BLOCK + tl.arange(0, BLOCK)
    expert = _expert_of(ids_ptr, p, p < pairs, first, count)
    earlier_pairs = tl.zeros([BLOCK, STEP], tl.int32)  # added up once, not in every step
    for q0 in range(chunk * CHUNK, tl.minimum(pairs, (block + 1) * BLOCK), STEP):
        q = q0 + tl.arange(0, STEP)
        other_expert = _expert_of(ids_ptr, q, q < pairs, first, count)
        earlier = (other_expert[None, :] == expert[:, None]) & (q[None, :] < p[:, None])
        earlier_pairs += earlier.to(tl.int32)
    rank = _pick(starts + before, expert, EXPERTS) + tl.sum(earlier_pairs, 1)
    tl.store(pairs_ptr + rank, p, mask=expert >= 0)
    _write_tiles(tiles_ptr, block * BLOCK + tl.arange(0, BLOCK), tiles, total, starts, EXPERTS, BLOCK_M)


@triton.jit
def _write_tiles(tiles_ptr, tile, tiles, total, starts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which expert's pairs each of these tiles has, where they start and how many."""
    each = (total + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(each, 0)
    expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    done = (tile - _pick(ends - each, expert, EXPERTS)) * BLOCK_M
    length = tl.minimum(_pick(total, expert, EXPERTS) - done, BLOCK_M)
    there = expert < EXPERTS
    at = tiles_ptr + 3 * tile
    tl.store(at, tl.where(there, expert, -1), mask=tile < tiles)
    tl.store(at + 1, _pick(starts, expert, EXPERTS) + done, mask=(tile < tiles) & there)
    tl.store(at + 2, length, mask=(tile < tiles) & there)


def place(ids_TK: torch.Tensor, experts: int, block_m: int, *, first: int = 0, pdl: bool = False) -> Placed:
    """The pairs of `experts` experts, of which `first` is the number of the first, and their tiles.

    ids_TK: int32 [T, K] contiguous; T * K at least 1. One launch up to `FEW` pairs, else two; no host round trip.
    """
    pairs = ids_TK.numel()
    tiles = most_tiles(pairs, experts, block_m)
    placed = Placed(ids_TK.new_empty(pairs), ids_TK.new_empty(tiles, 3))
    if pairs <= FEW:
        _place_few_kernel[(experts,)](
            ids_TK,
            *placed,
            pairs,
            tiles,
            first,
            BLOCK_M=block_m,
            STEP=min(_COUNTED, max(64, next_power_of_2(pairs))),
            PDL=pdl,
            num_warps=4,
            **launch_options(pdl),
        )
        return placed
    size, chunks = next_power_of_2(max(2, experts)), triton.cdiv(pairs, CHUNK)
    counts = ids_TK.new_empty(chunks, size)
    _count_kernel[(chunks,)](
        ids_TK,
        counts,
        pairs,
        first,
        experts,
        EXPERTS=size,
        CHUNK=CHUNK,
        STEP=_COUNTED,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    _place_kernel[(triton.cdiv(max(pairs, tiles), _BLOCK),)](
        ids_TK,
        counts,
        *placed,
        pairs,
        tiles,
        first,
        experts,
        chunks,
        EXPERTS=size,
        CHUNK=CHUNK,
        BLOCK_M=block_m,
        BLOCK=_BLOCK,
        STEP=_STEP,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return placed


def place_reference(ids_TK: torch.Tensor, experts: int, block_m: int, *, first: int = 0) -> Placed:
    """`place` in plain torch; pairs without an expert here are left out. (Where few pairs' tiles that are none stand is
    `place`'s own.)"""
    flat = ids_TK.flatten().long() - first
    here = torch.where((flat >= 0) & (flat < experts))[0]
    order = here[flat[here].sort(stable=True).indices]
    tiles, start = [], 0
    for expert, length in enumerate(flat[here].bincount(minlength=experts).tolist()):
        tiles += [(expert, start + at, min(block_m, length - at)) for at in range(0, length, block_m)]
        start += length
    tiles += [(-1, 0, 0)] * (most_tiles(len(flat), experts, block_m) - len(tiles))
    return Placed(order.int(), torch.tensor(tiles, dtype=torch.int32, device=ids_TK.device))
