"""The sums of two to four rows of x with rows of weights, on the CUDA cores: what of `gemv_kernels` is for them."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.linear.epilogue import norm_factor


@triton.jit
def weights_tile(w_row, up_row, k, mask, ACTIVATION: tl.constexpr):
    """The tile at columns k of [N, 1] rows of weights, and of those of the up half."""
    w = tl.load(w_row + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    up = w
    if ACTIVATION != "":
        up = tl.load(up_row + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return w, up


@triton.jit
def _row(x_ptr, norm_ptr, k, IN_FEATURES: tl.constexpr, HAS_NORM: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """Columns k of a row of x, by the norm's weight, and their squares without it."""
    x = tl.load(x_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
    squares = x * x
    if HAS_NORM:
        x *= norm_factor(norm_ptr, k, IN_FEATURES, UNIT_OFFSET)
    return x, squares


@triton.jit
def _stacked(m, first, second, third, fourth, BLOCK_M: tl.constexpr):
    """[M, ..] of what each of so many rows has."""
    if BLOCK_M == 2:
        rows = tl.where(m == 0, first, second)
    else:
        rows = tl.where(m < 2, tl.where(m == 0, first, second), tl.where(m == 2, third, fourth))
    return rows


@triton.jit
def sum_rows(
    x_ptr,
    w_row,  # [N, 1], and the same of the up half
    up_row,
    norm_ptr,
    w_next,  # the first tiles
    up_next,
    n_ok,
    k0,
    m,
    rows,
    x_stride,
    IN_FEATURES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products of two to four rows of x with N rows of weights, which are read once: [M, N] of the gate, [M, N] of the
    up half, and the sums of the rows' squares, [M]. Rows past the last are the last again."""
    x1_ptr = x_ptr + x_stride
    x2_ptr = x_ptr + tl.minimum(2, rows - 1) * x_stride
    x3_ptr = x_ptr + tl.minimum(3, rows - 1) * x_stride
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1, acc2, acc3, up0, up1, up2, up3 = acc0, acc0, acc0, acc0, acc0, acc0, acc0
    squares0 = tl.zeros([BLOCK_K], tl.float32)
    squares1, squares2, squares3 = squares0, squares0, squares0
    for i in tl.static_range(TILES):
        k = k0 + i * BLOCK_K
        w = w_next.to(tl.float32)
        up = up_next.to(tl.float32)
        if i + 1 < TILES:
            mask = n_ok[:, None] & (k + BLOCK_K < IN_FEATURES)[None, :]
            w_next, up_next = weights_tile(w_row, up_row, k + BLOCK_K, mask, ACTIVATION)
        x0, square0 = _row(x_ptr, norm_ptr, k, IN_FEATURES, HAS_NORM, UNIT_OFFSET)
        x1, square1 = _row(x1_ptr, norm_ptr, k, IN_FEATURES, HAS_NORM, UNIT_OFFSET)
        acc0 += w * x0[None, :]
        acc1 += w * x1[None, :]
        squares0 += square0
        squares1 += square1
        if ACTIVATION != "":
            up0 += up * x0[None, :]
            up1 += up * x1[None, :]
        if BLOCK_M > 2:
            x2, square2 = _row(x2_ptr, norm_ptr, k, IN_FEATURES, HAS_NORM, UNIT_OFFSET)
            x3, square3 = _row(x3_ptr, norm_ptr, k, IN_FEATURES, HAS_NORM, UNIT_OFFSET)
            acc2 += w * x2[None, :]
            acc3 += w * x3[None, :]
            squares2 += square2
            squares3 += square3
            if ACTIVATION != "":
                up2 += up * x2[None, :]
                up3 += up * x3[None, :]
    at = m[:, None]
    total = _stacked(at, tl.sum(acc0, 1)[None, :], tl.sum(acc1, 1)[None, :], tl.sum(acc2, 1)[None, :],
                     tl.sum(acc3, 1)[None, :], BLOCK_M)  # fmt: skip
    up_total = total
    if ACTIVATION != "":
        up_total = _stacked(at, tl.sum(up0, 1)[None, :], tl.sum(up1, 1)[None, :], tl.sum(up2, 1)[None, :],
                            tl.sum(up3, 1)[None, :], BLOCK_M)  # fmt: skip
    squares = _stacked(m, tl.sum(squares0, 0), tl.sum(squares1, 0), tl.sum(squares2, 0), tl.sum(squares3, 0), BLOCK_M)
    return total, up_total, squares
