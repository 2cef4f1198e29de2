"""The device code of `grouped_scaled`: the weights are the wide operand, so that few pairs are a tile's narrow side."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.codes_kernels import scale_float, scale_for
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.grouped_kernels import gate_and_up, store_pairs, tile_of_list
from tpctl.kernels.linear.codes_gemm_kernels import row_tile, scales_of


@triton.jit
def _finished(sums, scale, n, factors_ptr, bias_ptr, FORM: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums [N, M] with what is the same for all of an output's: its scale (1 where blocks had theirs), factor, bias."""
    y = sums * scale[:, None]
    if FORM.has_factors:
        y *= tl.load(factors_ptr + n)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    return y


@triton.jit
def _block_scales(s_rows, i, FORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scales of the outputs whose own begin at `s_rows`, for the i-th BLOCK_K of their inputs."""
    SCALES: tl.constexpr = FORM.scales
    return scale_float(tl.load(s_rows + (i * BLOCK_K + FORM.first) // FORM.unit), SCALES)


@triton.jit
def _store_rounded(value, q_ptr, scales_ptr, pair, block, n, WIDTH: tl.constexpr, LARGEST: tl.constexpr):
    """`value` [N, M], columns n of these pairs' rows, rounded to 8 bits as `quantize_rows` does; N is a block."""
    BLOCKS: tl.constexpr = WIDTH // value.shape[0]
    there = pair >= 0
    row = tl.maximum(pair, 0).to(tl.int64)
    scale = scale_for(value, 0, LARGEST)
    tl.store(scales_ptr + row * BLOCKS + block, scale, mask=there)
    value = tl.clamp(value / scale[None, :], -LARGEST, LARGEST)
    if q_ptr.dtype.element_ty == tl.int8:
        value = tl.floor(value + 0.5)
    q = tl.trans(value.to(q_ptr.dtype.element_ty))
    tl.store(q_ptr + row[:, None] * WIDTH + n[None, :], q, mask=there[:, None] & (n < WIDTH)[None, :])


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
    out_scales_ptr,  # with LARGEST: float32 [pairs, width / BLOCK_N]
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GATING: tl.constexpr,  # None: the result is weighed
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LARGEST: tl.constexpr,  # of the numbers that the result is rounded to, in blocks of BLOCK_N; 0: it is not
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
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            up = acc
            # Scales are read a tile ahead: operands come through shared memory, several ahead, and these do not.
            x_scales = q_scales_ptr + row * BLOCKS
            next_x, next_w = tl.load(x_scales), _block_scales(s_rows, 0, FORM, BLOCK_K)
            next_up = _block_scales(up_s_rows, 0, FORM, BLOCK_K) if GATED else next_w
            for i in tl.range(0, BLOCKS, num_stages=STAGES):
                x_scale, w_scale, up_scale = next_x, next_w, next_up
                after = tl.minimum(i + 1, BLOCKS - 1)
                next_x, next_w = tl.load(x_scales + after), _block_scales(s_rows, after, FORM, BLOCK_K)
                if GATED:
                    next_up = _block_scales(up_s_rows, after, FORM, BLOCK_K)
                x = row_tile(x_rows, i * BLOCK_K, COLUMNS, BLOCK_K)
                part = tl.dot(row_tile(w_rows, i * BLOCK_K, COLUMNS, BLOCK_K), x.T, out_dtype=SUM).to(tl.float32)
                acc += part * w_scale[:, None] * x_scale[None, :]
                if GATED:
                    part = tl.dot(row_tile(up_rows, i * BLOCK_K, COLUMNS, BLOCK_K), x.T, out_dtype=SUM).to(tl.float32)
                    up += part * up_scale[:, None] * x_scale[None, :]
            scale, last_scale = ones, ones
        else:
            sums = tl.zeros([BLOCK_N, BLOCK_M], SUM)
            up_sums = sums
            for i in tl.range(0, BLOCKS, num_stages=STAGES):
                # FP8 tensor cores keep 14 bits of their own sums: after 128 inputs those are added in float32.
                x = row_tile(x_rows, i * BLOCK_K, COLUMNS, BLOCK_K).T
                y = row_tile(w_rows, i * BLOCK_K, COLUMNS, BLOCK_K)
                sums = tl.dot(y, x, sums, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
                if GATED:
                    y = row_tile(up_rows, i * BLOCK_K, COLUMNS, BLOCK_K)
                    up_sums = tl.dot(y, x, up_sums, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
            x_scale = tl.load(q_scales_ptr + row)[None, :]
            acc, up = sums.to(tl.float32) * x_scale, up_sums.to(tl.float32) * x_scale
            scale = scale_float(tl.load(s_rows), SCALES)
            last_scale = scale_float(tl.load(up_s_rows), SCALES)
        factors_ptr += wide * OUTPUTS
        bias_ptr += wide * OUTPUTS
        value = _finished(acc, scale, gate_n, factors_ptr, bias_ptr, FORM, HAS_BIAS)
        if GATED:
            up_value = _finished(up, last_scale, up_n, factors_ptr, bias_ptr, FORM, HAS_BIAS)
            value = gated(value, up_value, GATING)
        else:
            value *= tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)[None, :]
        if LARGEST > 0:
            _store_rounded(value, out_ptr, out_scales_ptr, pair, tl.program_id(0), n, WIDTH, LARGEST)
        else:
            store_pairs(tl.trans(value), out_ptr, pair, n, WIDTH)
