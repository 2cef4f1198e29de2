"""The device code of `grouped_scaled`."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.codes_kernels import scale_float
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.grouped_kernels import gate_and_up, store_pairs, tile_of_list
from tpctl.kernels.linear.codes_gemm_kernels import row_tile, scales_of


@triton.jit
def _finished(sums, scale, n, factors_ptr, bias_ptr, FORM: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums with what is the same for all of an output's: its scale (1 where blocks had theirs), factor and bias."""
    found = sums * scale[None, :]
    if FORM.has_factors:
        found *= tl.load(factors_ptr + n)[None, :]
    if HAS_BIAS:
        found += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    return found


@triton.jit
def grouped_scaled_kernel(
    q_ptr,  # [R, K], 8-bit numbers: GATED a row for each token, else for each pair
    q_scales_ptr,  # float32, one a row or one for every BLOCK_K of it
    pairs_ptr,
    tiles_ptr,
    weights_ptr,
    w_ptr,  # [E, OUTPUTS, K]
    scales_ptr,
    rows_ptr,  # the row of scales of each output
    factors_ptr,
    bias_ptr,
    out_ptr,  # [pairs, width]
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GATING: tl.constexpr,  # None: the result is weighed
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of an expert for BLOCK_M of its pairs."""
    GATED: tl.constexpr = GATING is not None
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    COLUMNS: tl.constexpr = FORM.columns
    SCALES: tl.constexpr = FORM.scales
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    SUM: tl.constexpr = tl.int32 if FORM.kind == "int8" else tl.float32
    IN_BLOCKS: tl.constexpr = FORM.mode == "tile"
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert, pair = tile_of_list(pairs_ptr, tiles_ptr, tl.program_id(1), BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert >= 0:
        wide = expert.to(tl.int64)
        gate_n, up_n = gate_and_up(n, WIDTH, GATED, INTERLEAVED)
        row = tl.maximum(pair // PER_TOKEN if GATED else pair, 0).to(tl.int64)
        x_rows = q_ptr + row[:, None] * COLUMNS
        w_rows = w_ptr + (wide * OUTPUTS + gate_n)[:, None] * COLUMNS
        scales_ptr += wide * SCALE_ROWS * FORM.scale_columns
        s_rows = scales_of(scales_ptr, rows_ptr, gate_n, FORM)
        up_rows, up_s_rows = w_rows, s_rows
        if GATED:
            up_rows = w_ptr + (wide * OUTPUTS + up_n)[:, None] * COLUMNS
            up_s_rows = scales_of(scales_ptr, rows_ptr, up_n, FORM)
        ones = tl.full([BLOCK_N], 1.0, tl.float32)
        if IN_BLOCKS:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = acc
            for i in tl.range(0, BLOCKS, num_stages=STAGES):
                block = (i * BLOCK_K + FORM.first) // FORM.unit
                x_scale = tl.load(q_scales_ptr + row * BLOCKS + i)
                x = row_tile(x_rows, i * BLOCK_K, COLUMNS, BLOCK_K)
                part = tl.dot(x, row_tile(w_rows, i * BLOCK_K, COLUMNS, BLOCK_K).T, out_dtype=SUM).to(tl.float32)
                acc += part * x_scale[:, None] * scale_float(tl.load(s_rows + block), SCALES)[None, :]
                if GATED:
                    part = tl.dot(x, row_tile(up_rows, i * BLOCK_K, COLUMNS, BLOCK_K).T, out_dtype=SUM).to(tl.float32)
                    up += part * x_scale[:, None] * scale_float(tl.load(up_s_rows + block), SCALES)[None, :]
            scale, up_scale = ones, ones
        else:
            sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
            up_sums = sums
            for i in tl.range(0, BLOCKS, num_stages=STAGES):
                # FP8 tensor cores keep 14 bits of their own sums: after 128 inputs those are added in float32.
                x = row_tile(x_rows, i * BLOCK_K, COLUMNS, BLOCK_K)
                y = row_tile(w_rows, i * BLOCK_K, COLUMNS, BLOCK_K).T
                sums = tl.dot(x, y, sums, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
                if GATED:
                    y = row_tile(up_rows, i * BLOCK_K, COLUMNS, BLOCK_K).T
                    up_sums = tl.dot(x, y, up_sums, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
            x_scale = tl.load(q_scales_ptr + row)[:, None]
            acc, up = sums.to(tl.float32) * x_scale, up_sums.to(tl.float32) * x_scale
            scale = scale_float(tl.load(s_rows), SCALES)
            up_scale = scale_float(tl.load(up_s_rows), SCALES)
        factors_ptr += wide * OUTPUTS
        bias_ptr += wide * OUTPUTS
        value = _finished(acc, scale, gate_n, factors_ptr, bias_ptr, FORM, HAS_BIAS)
        if GATED:
            up_value = _finished(up, up_scale, up_n, factors_ptr, bias_ptr, FORM, HAS_BIAS)
            value = gated(value, up_value, GATING)
        else:
            value *= tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)[:, None]
        store_pairs(value, out_ptr, pair, n, WIDTH)
