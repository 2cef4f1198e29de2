"""The device code of `grouped` for quantised experts: `linear.codes_linear`'s sums, of one expert's matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.grouped_kernels import gate_and_up, store_pairs, tile_of
from tpctl.kernels.linear.codes_linear_kernels import finished_sums, tile_sums
from tpctl.kernels.linear.codes_tiles import code_rows


@triton.jit(do_not_specialize=["rows"])
def grouped_codes_kernel(
    x_ptr,  # of packed codes that are made numbers by bits, words of two inputs
    ids_ptr,
    pairs_ptr,
    tiles_ptr,
    weights_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,  # the row of scales of each output
    groups_ptr,
    factors_ptr,
    bias_ptr,
    out_ptr,  # [T * PER_TOKEN, width]
    rows,
    x_stride,
    first,
    count,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,
    LISTED: tl.constexpr,
    GATING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,  # of a row in a tile
    GROUPS: tl.constexpr,  # parts of a row in a tile, each within one scale
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`grouped_linear_kernel` for codes."""
    GATED: tl.constexpr = GATING is not None
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    TILES: tl.constexpr = (FORM.row_bytes + BYTES - 1) // BYTES
    WHOLE: tl.constexpr = FORM.row_bytes % BYTES == 0
    expert, pair = tile_of(ids_ptr, pairs_ptr, tiles_ptr, rows, first, count, PER_TOKEN, SLOTS, LISTED, GATED, BLOCK_M,
                           PDL)  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < WIDTH
    if expert >= 0:
        wide = expert.to(tl.int64)
        gate_n, up_n = gate_and_up(n, WIDTH, GATED, INTERLEAVED)
        w_ptr += wide * OUTPUTS * FORM.row_bytes
        scales_ptr += wide * SCALE_ROWS * FORM.scale_columns
        if FORM.has_zeros:
            zeros_ptr += wide * SCALE_ROWS * FORM.scale_columns
        if FORM.has_groups:
            groups_ptr += wide * FORM.columns
        if FORM.has_factors:
            factors_ptr += wide * OUTPUTS
        if HAS_BIAS:
            bias_ptr += wide * OUTPUTS
        w_rows, s_rows, z_rows = code_rows(w_ptr, scales_ptr, zeros_ptr, rows_ptr, gate_n, FORM)
        up_w_rows, up_s_rows, up_z_rows = w_rows, s_rows, z_rows
        if GATED:
            up_w_rows, up_s_rows, up_z_rows = code_rows(w_ptr, scales_ptr, zeros_ptr, rows_ptr, up_n, FORM)
        if PDL and not GATED:
            tl.extra.cuda.gdc_wait()
        x_row = tl.maximum(pair // PER_TOKEN if GATED else pair, 0).to(tl.int64)
        acc, up, _ = tile_sums(
            x_ptr + x_row[:, None] * x_stride, x_ptr, w_rows, s_rows, z_rows, up_w_rows, up_s_rows, up_z_rows,
            groups_ptr, 0, pair >= 0, FORM, WHOLE, False, False, GATED, BLOCK_M, BLOCK_N, BYTES, GROUPS, TILES, STAGES
        )  # fmt: skip
        value = finished_sums(acc, s_rows, factors_ptr, gate_n, FORM)
        if HAS_BIAS:
            value += tl.load(bias_ptr + gate_n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_value = finished_sums(up, up_s_rows, factors_ptr, up_n, FORM)
            if HAS_BIAS:
                up_value += tl.load(bias_ptr + up_n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
            value = gated(value, up_value, GATING)
        else:
            value *= tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)[:, None]
        store_pairs(value, out_ptr, pair, n, WIDTH)
