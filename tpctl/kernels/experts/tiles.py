"""Tiles of experts' matrices [E, N, K]. Rows of all experts count through: row n of expert e is e * N + n."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.prefetch import prefetch


@triton.jit
def ask_for(w_ptr, row, k0, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ask the L2 cache for a tile of rows [N] of a matrix."""
    LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = (BLOCK_K + LINE - 1) // LINE
    column = tl.minimum(k0 + tl.arange(0, LINES) * LINE, INPUTS - 1)
    prefetch(w_ptr + row[:, None] * INPUTS + column[None, :])


@triton.jit
def load_tile(
    w_ptr,
    row,  # [N] int64
    ok,  # [N], which rows are to be read
    k0,  # the first of its columns, a multiple of BLOCK_K
    INPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches beyond the last column, and every row is to be read
):
    """[N, BLOCK_K]; zeros where nothing is to be read."""
    column = k0 + tl.arange(0, BLOCK_K)
    pointers = w_ptr + row[:, None] * INPUTS + column[None, :]
    if WHOLE:
        values = tl.load(pointers, eviction_policy="evict_first")
    else:
        mask = ok[:, None] & (column < INPUTS)[None, :]
        values = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    return values


@triton.jit
def load_parts(
    w_ptr,
    row,  # [N] int64
    ok,  # [N], which rows are to be read
    k0,  # the first of its columns, a multiple of PARTS * LANES
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,  # columns that a warp reads at once, or fewer
    WHOLE: tl.constexpr,  # as for `load_tile`
):
    """[N, PARTS, LANES], the columns of a row in as many parts; zeros where nothing is to be read.

    Triton lays a tile's warps along its rows then, so that each sums its own without the others; of [N, K] it lays as
    many as there is room for along a row.
    """
    part = tl.arange(0, PARTS)[None, :, None]
    column = k0 + part * LANES + tl.arange(0, LANES)[None, None, :]
    pointers = w_ptr + row[:, None, None] * INPUTS + column
    if WHOLE:
        values = tl.load(pointers, eviction_policy="evict_first")
    else:
        mask = ok[:, None, None] & (column < INPUTS)
        values = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    return values
