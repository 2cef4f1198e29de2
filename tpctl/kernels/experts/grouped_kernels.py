"""The device code of `grouped`."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.experts.finish import finish
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.tiles import ask_for, load_tile


@triton.jit
def tile_of_list(pairs_ptr, tiles_ptr, tile, BLOCK_M: tl.constexpr):
    """A tile that `placing` made: its expert (-1: none) and pairs (-1: none)."""
    m = tl.arange(0, BLOCK_M)
    expert = tl.load(tiles_ptr + 3 * tile)
    there = expert >= 0
    start = tl.load(tiles_ptr + 3 * tile + 1, mask=there, other=0)
    length = tl.load(tiles_ptr + 3 * tile + 2, mask=there, other=0)
    return expert, tl.load(pairs_ptr + start + m, mask=m < length, other=-1)


@triton.jit
def _tile_of_pair(
    ids_ptr, pair, rows, first, count, PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """All tokens that chose the expert of `pair`, if that is the first of its pairs: the expert (else -1), and the
    pair of each token (-1: none)."""
    token, slot = tl.arange(0, BLOCK_M), tl.arange(0, SLOTS)
    at = token[:, None] * PER_TOKEN + slot[None, :]
    mask = (token < rows)[:, None] & (slot < PER_TOKEN)[None, :]
    chosen = tl.load(ids_ptr + at, mask=mask, other=-1)
    wanted = tl.load(ids_ptr + pair)
    same = mask & (chosen == wanted)
    earlier = tl.sum(tl.sum((same & (at < pair)).to(tl.int32), 1), 0)
    expert = wanted - first
    taken = (expert >= 0) & (expert < count) & (earlier == 0)
    return tl.where(taken, expert, -1), tl.max(tl.where(same, at, -1), 1)


@triton.jit
def tile_of(
    ids_ptr,
    pairs_ptr,
    tiles_ptr,
    rows,
    first,
    count,
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,
    LISTED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """The expert (-1: none) and the pairs of this program's tile.

    Programs of a down matrix look before their wait: ids and tiles were there when those of gate_up, which let them
    start, had ended theirs. They have still to wait for h.
    """
    if PDL and GATED:
        tl.extra.cuda.gdc_wait()
    if LISTED:
        expert, pair = tile_of_list(pairs_ptr, tiles_ptr, tl.program_id(1), BLOCK_M)
    else:
        expert, pair = _tile_of_pair(ids_ptr, tl.program_id(1), rows, first, count, PER_TOKEN, SLOTS, BLOCK_M)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    return expert, pair


@triton.jit
def gate_and_up(n, WIDTH: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The outputs of gate and up that columns n of a result are made of; not GATED, the first are n. Beyond WIDTH the
    last: no mask on the weights' loads, what is read twice is not stored."""
    n_safe = tl.minimum(n, WIDTH - 1)
    gate = 2 * n_safe if INTERLEAVED and GATED else n_safe
    return gate, gate + (1 if INTERLEAVED else WIDTH)


@triton.jit
def store_pairs(value, out_ptr, pair, n, WIDTH: tl.constexpr):
    """`value` [M, N] as columns n of the rows of these pairs."""
    mask = (pair >= 0)[:, None] & (n < WIDTH)[None, :]
    pointers = out_ptr + tl.maximum(pair, 0).to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    acc,  # [N, M] float32
    w,  # [N, K]
    x,  # [M, K]
):
    return tl.dot(w.to(x.dtype), tl.trans(x), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "first", "count"])
def grouped_linear_kernel(
    x_ptr,
    ids_ptr,
    pairs_ptr,
    tiles_ptr,
    weights_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,  # [T * PER_TOKEN, width]
    rows,
    x_stride,
    first,
    count,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PART: tl.constexpr,  # of the matrices only those of `count` experts from `first` on are here; other tiles are none
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,  # PER_TOKEN, or the next power of two
    LISTED: tl.constexpr,  # the tiles are `placing`'s, else one for each pair
    GATING: tl.constexpr,  # None: x has a row for each pair, and the result is weighed; else a row for each token
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of an expert for BLOCK_M of its pairs; the weights are the wide operand."""
    GATED: tl.constexpr = GATING is not None
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    WHOLE: tl.constexpr = INPUTS % BLOCK_K == 0
    expert, pair = tile_of(ids_ptr, pairs_ptr, tiles_ptr, rows, first, count, PER_TOKEN, SLOTS, LISTED, GATED, BLOCK_M,
                           PDL)  # fmt: skip
    if PART:
        expert = tl.where((expert >= first) & (expert < first + count), expert - first, -1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < WIDTH
    if expert >= 0:
        wide = expert.to(tl.int64) * OUTPUTS
        gate_n, up_n = gate_and_up(n, WIDTH, GATED, INTERLEAVED)
        row, up_row = wide + gate_n, wide + up_n
        if PDL and not GATED:
            ask_for(w_ptr, row, 0, INPUTS, BLOCK_K)
            tl.extra.cuda.gdc_wait()
        m_ok = pair >= 0
        x_row = tl.maximum(pair // PER_TOKEN if GATED else pair, 0).to(tl.int64)
        x_rows = x_ptr + x_row[:, None] * x_stride
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up_acc = acc
        for k0 in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            x_mask = m_ok[:, None]
            if not WHOLE:
                x_mask &= (k < INPUTS)[None, :]
            x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
            acc = _product(acc, load_tile(w_ptr, row, n_ok, k0, INPUTS, BLOCK_K, WHOLE), x)
            if GATED:
                up = load_tile(w_ptr, up_row, n_ok, k0, INPUTS, BLOCK_K, WHOLE)
                up_acc = _product(up_acc, up, x)
        value = acc
        if HAS_BIAS:
            value += tl.load(bias_ptr + row, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if HAS_BIAS:
                up_acc += tl.load(bias_ptr + up_row, mask=n_ok, other=0.0).to(tl.float32)[:, None]
            value = gated(value, up_acc, GATING)
        else:
            value *= tl.load(weights_ptr + pair, mask=m_ok, other=0.0)[None, :]
        store_pairs(tl.trans(value), out_ptr, pair, n, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def gather_sum_kernel(
    y_ptr,  # [T * PER_TOKEN, COLUMNS]
    ids_ptr,
    shared_ptr,  # [T, COLUMNS]
    factors_ptr,
    out_ptr,
    residual_ptr,
    peers_ptr,
    epochs_ptr,
    rows,
    shared_stride,
    out_stride,
    residual_stride,
    row_words,
    plane_words,
    first,
    count,
    COLUMNS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PEERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """What a token's pairs add up to, in the order of its slots, and what its shared expert adds."""
    block, token = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    n_ok = n < COLUMNS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    at = token.to(tl.int64) * PER_TOKEN
    for slot in tl.static_range(PER_TOKEN):
        expert = tl.load(ids_ptr + at + slot) - first
        here = (expert >= 0) & (expert < count)
        total += tl.load(y_ptr + (at + slot) * COLUMNS + n, mask=n_ok & here, other=0.0).to(tl.float32)
    if HAS_SHARED:
        shared = tl.load(shared_ptr + token.to(tl.int64) * shared_stride + n, mask=n_ok, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            shared *= tl.load(factors_ptr + token)
        total += shared
    m = token + tl.arange(0, 1)
    finish(total[None, :], m, block, rows, out_ptr, residual_ptr, peers_ptr, epochs_ptr, out_stride, residual_stride,
           row_words, plane_words, COLUMNS, HAS_RESIDUAL, RANK, WORLD, PEERS)  # fmt: skip
