"""The device code of `codes_gemm`."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.codes_kernels import scale_float, scale_for
from tpctl.kernels.linear.codes_tiles import code_rows, number, tile_scales


@triton.jit
def quantize_kernel(
    x_ptr,
    q_ptr,
    scales_ptr,
    norm_ptr,
    x_stride,
    scales_stride,  # of rows
    block_stride,
    columns,
    eps,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,  # the row, padded
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, WIDTH // BLOCK)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok = at < columns
    if HAS_NORM:
        weight = tl.load(norm_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + at, mask=ok, other=0.0)
    value = x.to(tl.float32)
    if HAS_NORM:
        value *= tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / columns + eps)
        if UNIT_OFFSET:
            value *= 1.0 + weight
        else:
            value = value.to(x.dtype).to(tl.float32) * weight
        value = value.to(x.dtype).to(tl.float32)
    scale = scale_for(value, 1, LARGEST)
    value = tl.clamp(value / scale[:, None], -LARGEST, LARGEST)
    if q_ptr.dtype.element_ty == tl.int8:
        value = tl.floor(value + 0.5)
    tl.store(q_ptr + row * columns + at, value.to(q_ptr.dtype.element_ty), mask=ok)
    blocks = (columns + BLOCK - 1) // BLOCK
    tl.store(scales_ptr + row * scales_stride + block * block_stride, scale, mask=block < blocks)


@triton.jit
def row_tile(rows_at, k, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[.., BLOCK_K] of rows of COLUMNS numbers, which begin at `rows_at` [.., 1], from column k on; zeros beyond the
    last."""
    at = k + tl.arange(0, BLOCK_K)[None, :]
    if COLUMNS % BLOCK_K == 0:
        tile = tl.load(rows_at + at)
    else:
        tile = tl.load(rows_at + at, mask=at < COLUMNS, other=0.0)
    return tile


@triton.jit
def scales_of(scales_ptr, rows_ptr, n, FORM: tl.constexpr):
    """Where the scales of outputs n begin."""
    row = tl.load(rows_ptr + n) if FORM.has_rows else n
    return scales_ptr + row.to(tl.int64) * FORM.scale_columns


@triton.jit
def _tile(source, row, rows, k, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[BLOCK, BLOCK_K] at (row, k) of a matrix [rows, COLUMNS]; beyond its columns, zeros."""
    if TMA:
        tile = source.load([row, k])
    else:
        rows_at = tl.minimum(row + tl.arange(0, BLOCK), rows - 1).to(tl.int64)[:, None] * COLUMNS
        tile = row_tile(source + rows_at, k, COLUMNS, BLOCK_K)
    return tile


@triton.jit
def scaled_gemm_kernel(
    q,  # [rows, K]: with TMA a descriptor of blocks [BLOCK_M, BLOCK_K], else a pointer
    w,  # [N, K]: blocks [BLOCK_N, BLOCK_K]
    q_scales_ptr,  # float32, one a row or one for every BLOCK_K of it
    scales_ptr,
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
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    COLUMNS: tl.constexpr = FORM.columns
    SCALES: tl.constexpr = FORM.scales
    # Eight blocks of rows pass along the outputs together, so that both operands stay in the L2 cache.
    TOGETHER: tl.constexpr = 8
    row_blocks = tl.cdiv(rows, BLOCK_M)
    width = TOGETHER * tl.cdiv(out_features, BLOCK_N)
    program = tl.program_id(0)
    first_row = program // width * TOGETHER
    height = tl.minimum(row_blocks - first_row, TOGETHER)
    m0 = (first_row + program % width % height) * BLOCK_M
    n0 = program % width // height * BLOCK_N
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    m_safe = tl.minimum(m, rows - 1).to(tl.int64)
    n_safe = tl.minimum(n, out_features - 1)
    s_rows = scales_of(scales_ptr, rows_ptr, n_safe, FORM)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    SUM: tl.constexpr = tl.int32 if FORM.kind == "int8" else tl.float32
    if FORM.mode == "tile":
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        q_rows = q_scales_ptr + m_safe * BLOCKS
        # Scales are read a tile ahead: operands come through shared memory, several tiles ahead, and these do not.
        next_q = tl.load(q_rows)
        next_w = scale_float(tl.load(s_rows + FORM.first // FORM.unit), SCALES)
        for i in tl.range(0, BLOCKS, num_stages=STAGES):
            q_scale, w_scale = next_q, next_w
            after = tl.minimum(i + 1, BLOCKS - 1)
            next_q = tl.load(q_rows + after)
            next_w = scale_float(tl.load(s_rows + (after * BLOCK_K + FORM.first) // FORM.unit), SCALES)
            x = _tile(q, m0, rows, i * BLOCK_K, COLUMNS, BLOCK_M, BLOCK_K, TMA)
            y = _tile(w, n0, out_features, i * BLOCK_K, COLUMNS, BLOCK_N, BLOCK_K, TMA)
            part = tl.dot(x, y.T, out_dtype=SUM)
            acc += part.to(tl.float32) * q_scale[:, None] * w_scale[None, :]
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
        for i in tl.range(0, BLOCKS, num_stages=STAGES):
            # FP8 tensor cores keep 14 bits of their own sums: after 128 inputs those are added in float32.
            x = _tile(q, m0, rows, i * BLOCK_K, COLUMNS, BLOCK_M, BLOCK_K, TMA)
            y = _tile(w, n0, out_features, i * BLOCK_K, COLUMNS, BLOCK_N, BLOCK_K, TMA)
            sums = tl.dot(x, y.T, sums, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
        w_scale = scale_float(tl.load(s_rows), SCALES)
        acc = sums.to(tl.float32) * tl.load(q_scales_ptr + m_safe)[:, None] * w_scale[None, :]
    if FORM.has_factors:
        acc *= tl.load(factors_ptr + n_safe)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n_safe).to(tl.float32)[None, :]
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "stop"])
def decode_kernel(
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    groups_ptr,
    factors_ptr,
    out_ptr,
    start,
    stop,
    outputs,  # of a matrix, and its rows of scales
    scale_rows,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Numbers of outputs start to stop, of as many matrices as the grid has in its third place."""
    matrix = tl.program_id(2).to(tl.int64)
    w_ptr += matrix * outputs * FORM.row_bytes
    scales_ptr += matrix * scale_rows * FORM.scale_columns
    if FORM.has_zeros:
        zeros_ptr += matrix * scale_rows * FORM.scale_columns
    if FORM.has_groups:
        groups_ptr += matrix * FORM.columns
    if FORM.has_factors:
        factors_ptr += matrix * outputs
    out_ptr += matrix * (stop - start) * FORM.columns
    n = start + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_safe = tl.minimum(n, stop - 1)
    first = tl.program_id(1) * BYTES
    at = first + tl.arange(0, BYTES)
    w_rows, s_rows, z_rows = code_rows(w_ptr, scales_ptr, zeros_ptr, rows_ptr, n_safe, FORM)
    w = tl.load(w_rows + at[None, :], mask=(at < FORM.row_bytes)[None, :], other=0)
    scale, zero = tile_scales(s_rows, z_rows, first, FORM, BYTES, GROUPS)
    factor = tl.full([BLOCK_N, 1], 1.0, tl.float32)
    if FORM.mode == "end" or FORM.mode == "tile":
        factor = scale
    if FORM.has_factors:
        factor *= tl.load(factors_ptr + n_safe)[:, None]
    if FORM.packed:
        low = number(w & 15, s_rows, z_rows, groups_ptr, 2 * at, scale, zero, FORM) * factor
        high = number(w >> 4, s_rows, z_rows, groups_ptr, 2 * at + 1, scale, zero, FORM) * factor
        value = tl.reshape(tl.join(low, high), [BLOCK_N, 2 * BYTES])
        k = 2 * first + tl.arange(0, 2 * BYTES)
    else:
        value = number(w, s_rows, z_rows, groups_ptr, at, scale, zero, FORM) * factor
        k = at
    if PDL:  # the kernel before may still read what was in this memory
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mask = (n < stop)[:, None] & (k < FORM.columns)[None, :]
    tl.store(
        out_ptr + (n - start).to(tl.int64)[:, None] * FORM.columns + k[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask,
    )
