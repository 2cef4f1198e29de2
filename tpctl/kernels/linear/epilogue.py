"""What the linears of few rows share: how their sums become results, split ones too, and the norm before them."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.collective.all_reduce_kernels import send_values
from tpctl.kernels.common.activation import act


@triton.jit
def finish(
    acc,  # [BLOCK_M, BLOCK_N] float32, and the same of the up half
    up,
    scale,  # [BLOCK_M]
    m,
    n,
    block,
    rows,
    out_features,
    out_ptr,
    bias_ptr,
    residual_ptr,
    out_stride,
    residual_stride,
    epoch,
    targets,
    row_words,
    plane_words,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
):
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    m = m.to(tl.int64)
    value = acc * scale[:, None]
    if HAS_BIAS:
        value += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        gate_up = up * scale[:, None]
        if HAS_BIAS:
            gate_up += tl.load(bias_ptr + out_features + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
        value = act(value, ACTIVATION) * gate_up
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m[:, None] * residual_stride + n[None, :], mask=mask, other=0.0)
        value += residual.to(tl.float32)
    if WORLD > 1:
        send_values(value, m, block, rows, out_features, epoch, targets, row_words, plane_words, RANK, WORLD,
                    out_ptr.dtype.element_ty == tl.float32)  # fmt: skip
    tl.store(out_ptr + m[:, None] * out_stride + n[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def leave_sums(
    acc,  # [BLOCK_M, BLOCK_N] float32, and the same of the up half
    up,
    m,
    n,
    block,
    split,
    rows,
    out_features,
    partial_ptr,
    counters_ptr,
    WIDTH: tl.constexpr,  # 2: there is an up half
):
    """Leave a split's sums in scratch memory. Returns how many splits of the block had done so before."""
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    offsets = m[:, None] * out_features + n[None, :]
    plane = rows * out_features
    tl.store(partial_ptr + split * WIDTH * plane + offsets, acc, mask=mask)
    if WIDTH == 2:
        tl.store(partial_ptr + (split * WIDTH + 1) * plane + offsets, up, mask=mask)
    tl.debug_barrier()
    return tl.atomic_add(counters_ptr + block, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _add_split(acc, up, pointers, plane, mask, WIDTH: tl.constexpr):
    acc += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    if WIDTH == 2:
        up += tl.load(pointers + plane, mask=mask, other=0.0, cache_modifier=".cg")
    return acc, up


@triton.jit
def take_sums(
    m,
    n,
    block,
    rows,
    out_features,
    partial_ptr,
    counters_ptr,
    WIDTH: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """What all splits of a block have left, added in order; by the last of them, which empties the block's counter."""
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    offsets = m[:, None] * out_features + n[None, :]
    plane = rows * out_features
    tl.store(counters_ptr + block, 0)
    acc = tl.zeros(offsets.shape, tl.float32)
    up = acc
    if acc.numel <= 1024:  # few enough for registers to await all splits at once
        for s in tl.static_range(SPLIT_K):
            acc, up = _add_split(acc, up, partial_ptr + s * WIDTH * plane + offsets, plane, mask, WIDTH)
    else:
        for s in tl.range(0, SPLIT_K, num_stages=1, loop_unroll_factor=1):
            acc, up = _add_split(acc, up, partial_ptr + s * WIDTH * plane + offsets, plane, mask, WIDTH)
    return acc, up


@triton.jit
def norm_scale(x_ptr, m, rows, x_stride, eps, IN_FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """1 / rms of each row of x, read whole: a split program sees only its part."""
    BLOCK: tl.constexpr = 1024 if BLOCK_M == 1 else 128
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, IN_FEATURES, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = (m < rows)[:, None] & (k < IN_FEATURES)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    return tl.rsqrt(squares / IN_FEATURES + eps)


@triton.jit
def norm_factor(norm_ptr, k, IN_FEATURES: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    factor = tl.load(norm_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    return factor
