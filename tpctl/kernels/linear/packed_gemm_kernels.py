"""The device code of `packed_gemm`: weights of 4 bits become numbers in registers, on their way to the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.codes_kernels import fast_half, minus_zero
from tpctl.kernels.linear.codes_tiles import code_rows, tile_scales


@triton.jit
def take_apart_kernel(x_ptr, out_ptr, x_stride, half, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A row's even inputs, then its odd ones; x in words of two."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < half
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    word = tl.load(x_ptr + row * x_stride + at, mask=ok, other=0)
    tl.store(out_ptr + row * 2 * half + at, word.to(tl.int16), mask=ok)
    tl.store(out_ptr + row * 2 * half + half + at, (word >> 16).to(tl.int16), mask=ok)


@triton.jit
def packed_gemm_kernel(
    x,  # a descriptor of [rows, K], even inputs before odd ones, in blocks [BLOCK_M, BYTES]
    w,  # one of bytes [N, K / 2], in blocks [BLOCK_N, BYTES]
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factors_ptr,
    bias_ptr,
    out_ptr,
    rows,
    out_features,
    out_stride,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
    SPLIT: tl.constexpr,  # parts of the input, each summed by programs of its own
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    KIND: tl.constexpr = FORM.kind
    HALF: tl.constexpr = FORM.columns // 2
    SCALED: tl.constexpr = FORM.mode != "end"
    # The programs of a block of outputs follow each other, so that its codes are read from memory once.
    row_blocks = tl.cdiv(rows, BLOCK_M)
    m0 = tl.program_id(0) % row_blocks * BLOCK_M
    n0 = tl.program_id(0) // row_blocks * BLOCK_N
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    n_safe = tl.minimum(n, out_features - 1)
    _, s_rows, z_rows = code_rows(scales_ptr, scales_ptr, zeros_ptr, rows_ptr, n_safe, FORM)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    EACH: tl.constexpr = (HALF // BYTES + SPLIT - 1) // SPLIT
    part = tl.program_id(1)
    first = part * EACH
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    next_scale, next_zero = tile_scales(s_rows, z_rows, first * BYTES, FORM, BYTES, 1)
    for i in tl.range(first, tl.minimum(first + EACH, HALF // BYTES), num_stages=STAGES):
        scale, zero = next_scale, next_zero
        if SCALED:  # a tile ahead: codes come through shared memory, and these do not
            next_scale, next_zero = tile_scales(s_rows, z_rows, (i + 1) * BYTES, FORM, BYTES, 1)
        codes = w.load([n0, i * BYTES])
        even = x.load([m0, i * BYTES])
        odd = x.load([m0, HALF + i * BYTES])
        # Unlike `along`, a broadcast is where the tensor cores want it.
        minus = tl.broadcast_to(minus_zero(zero, KIND), codes.shape)
        factor = scale if SCALED else tl.full(scale.shape, 1.0, tl.float32)
        factor = tl.broadcast_to(factor.to(tl.bfloat16), codes.shape)
        acc = tl.dot(fast_half(codes, minus, factor, SCALED, False), even.T, acc)
        acc = tl.dot(fast_half(codes, minus, factor, SCALED, True), odd.T, acc)
    if not SCALED:
        acc *= next_scale
    if FORM.has_factors:
        acc *= tl.load(factors_ptr + n_safe)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n_safe).to(tl.float32)[:, None]
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    tile = tl.trans(acc.to(out_ptr.dtype.element_ty))
    row = m.to(tl.int64) + part.to(tl.int64) * rows
    tl.store(out_ptr + row[:, None] * out_stride + n[None, :], tile, mask=mask)


@triton.jit
def add_parts_kernel(
    parts_ptr,  # [SPLIT, rows, N], float32
    bias_ptr,
    out_ptr,
    numbers,
    out_features,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numbers
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.load(parts_ptr + at, mask=ok, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + part * numbers + at, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % out_features, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=ok)
