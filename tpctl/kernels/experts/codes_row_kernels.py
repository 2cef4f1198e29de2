"""The device code of `codes_row`: `linear.codes_gemv`'s tiles, of the experts that one token chose."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.experts.finish import finish
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.linear.codes_gemv_kernels import (
    half_row,
    load_codes,
    load_scales,
    load_words,
    row_factors,
    tile_sums,
)


@triton.jit
def _of_expert(
    expert,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    factors_ptr,
    bias_ptr,
    OUTPUTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Where an expert's codes, scales, zeros, factors and biases begin."""
    wide = expert.to(tl.int64)
    w_ptr += wide * OUTPUTS * FORM.row_bytes
    scales_ptr += wide * SCALE_ROWS * FORM.scale_columns
    if FORM.has_zeros:
        zeros_ptr += wide * SCALE_ROWS * FORM.scale_columns
    if FORM.has_factors:
        factors_ptr += wide * OUTPUTS
    if HAS_BIAS:
        bias_ptr += wide * OUTPUTS
    return w_ptr, scales_ptr, zeros_ptr, factors_ptr, bias_ptr


@triton.jit
def codes_row_gate_up_kernel(
    x_ptr,  # words of two bfloat16 numbers
    ids_ptr,  # [K]
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factors_ptr,
    bias_ptr,
    h_ptr,  # [K, WIDTH]
    first,
    count,
    FORM: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GATING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    G: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """h of 4 * R features of one of the token's experts; of another rank's, nothing."""
    N: tl.constexpr = 4 * R
    TILE: tl.constexpr = 64 * WARPS
    TILES: tl.constexpr = (FORM.row_bytes + TILE - 1) // TILE
    WHOLE: tl.constexpr = FORM.row_bytes % TILE == 0
    SCALED: tl.constexpr = FORM.mode != "end" or FORM.has_zeros
    slot = tl.program_id(1)
    first_row = tl.program_id(0) * N
    if PDL:  # the dependents read ids before they wait
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(ids_ptr + slot) - first
    if (expert >= 0) & (expert < count):
        w_ptr, scales_ptr, zeros_ptr, factors_ptr, bias_ptr = _of_expert(
            expert, w_ptr, scales_ptr, zeros_ptr, factors_ptr, bias_ptr, 2 * WIDTH, SCALE_ROWS, FORM, HAS_BIAS
        )
        w_ahead = ()
        scales_ahead = ()
        for i in tl.static_range(AHEAD):
            if i < TILES:
                w = load_codes(w_ptr, first_row, i * TILE, WIDTH, FORM, R, WARPS, 2, INTERLEAVED, WHOLE)
                w_ahead += (w,)  # type: ignore[assignment]
                if SCALED:
                    scales = load_scales(
                        scales_ptr, zeros_ptr, rows_ptr, first_row, i * TILE, WIDTH, FORM, R, WARPS, 2, INTERLEAVED, G
                    )
                    scales_ahead += (scales,)  # type: ignore[assignment]
        factors = row_factors(scales_ptr, rows_ptr, factors_ptr, first_row, WIDTH, FORM, R, 2, INTERLEAVED)
        x_next = load_words(x_ptr, 0, 1, 0, FORM, 1, WARPS)
        acc = tl.zeros([WARPS, 8 * R, 8], tl.float32)
        for i in tl.static_range(TILES):
            x = x_next
            if i + 1 < TILES:
                x_next = load_words(x_ptr, (i + 1) * TILE, 1, 0, FORM, 1, WARPS)
            scale, zero = first, first
            if SCALED:
                scale, zero = scales_ahead[i]
            acc += tile_sums(w_ahead[i], x, scale, zero, FORM, R, 1, WARPS, G)
            if i + AHEAD < TILES:
                start = (i + AHEAD) * TILE
                w = load_codes(w_ptr, first_row, start, WIDTH, FORM, R, WARPS, 2, INTERLEAVED, WHOLE)
                w_ahead += (w,)  # type: ignore[assignment]
                if SCALED:
                    scales = load_scales(
                        scales_ptr, zeros_ptr, rows_ptr, first_row, start, WIDTH, FORM, R, WARPS, 2, INTERLEAVED, G
                    )
                    scales_ahead += (scales,)  # type: ignore[assignment]
        sums = tl.sum(tl.sum(acc, 0), 1) * factors  # the other rows of x are zeros
        gate, up = tl.split(tl.permute(tl.reshape(sums, [2, N]), 1, 0))
        n = first_row + tl.arange(0, N)
        ok = n < WIDTH
        if HAS_BIAS:
            gate += tl.load(bias_ptr + half_row(n, 0, WIDTH, INTERLEAVED), mask=ok, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + half_row(n, 1, WIDTH, INTERLEAVED), mask=ok, other=0.0).to(tl.float32)
        value = gated(gate, up, GATING)
        tl.store(h_ptr + slot * WIDTH + n, value.to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit
def codes_row_down_kernel(
    h_ptr,  # [K, columns / 2], words of two bfloat16 numbers
    ids_ptr,  # [K]
    weights_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factors_ptr,
    bias_ptr,
    shared_ptr,  # [OUTPUTS], what the shared expert gave, and by what it counts
    shared_factor_ptr,
    out_ptr,
    residual_ptr,
    peers_ptr,
    epochs_ptr,
    out_stride,
    residual_stride,
    row_words,
    plane_words,
    first,
    count,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ALL_HERE: tl.constexpr,  # no expert is another rank's
    R: tl.constexpr,
    WARPS: tl.constexpr,
    G: tl.constexpr,
    AHEAD: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PEERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """8 * R outputs: all of the token's experts, weighed, in the order of their slots; what stands behind is added.
    The first AHEAD tiles are read before the wait for h."""
    N: tl.constexpr = 8 * R
    TILE: tl.constexpr = 64 * WARPS
    TILES: tl.constexpr = (FORM.row_bytes + TILE - 1) // TILE
    STEPS: tl.constexpr = TILES * PER_TOKEN
    WHOLE: tl.constexpr = FORM.row_bytes % TILE == 0 and ALL_HERE
    SCALED: tl.constexpr = FORM.mode != "end" or FORM.has_zeros
    block = tl.program_id(0)
    first_row = block * N
    n = first_row + tl.arange(0, N)
    bias = tl.zeros([N], tl.float32)
    at_experts = ()
    factors = ()
    here = ()
    for slot in tl.static_range(PER_TOKEN):
        expert = tl.load(ids_ptr + slot) - first
        mine = (expert >= 0) & (expert < count)
        weight = tl.load(weights_ptr + slot)
        of_expert = _of_expert(
            tl.where(mine, expert, 0), w_ptr, scales_ptr, zeros_ptr, factors_ptr, bias_ptr, OUTPUTS, SCALE_ROWS, FORM,
            HAS_BIAS
        )  # fmt: skip
        at_experts += (of_expert,)  # type: ignore[assignment]
        here += (mine,)  # type: ignore[assignment]
        factor = row_factors(of_expert[1], rows_ptr, of_expert[3], first_row, OUTPUTS, FORM, R, 1, False)
        factors += (tl.where(mine, factor * weight, 0.0),)  # type: ignore[assignment]
        if HAS_BIAS:
            added = tl.load(of_expert[4] + n, mask=(n < OUTPUTS) & mine, other=0.0).to(tl.float32)
            bias += tl.where(mine, weight * added, 0.0)
    w_ahead = ()
    scales_ahead = ()
    for i in tl.static_range(AHEAD):
        if i < STEPS:
            at = at_experts[i // TILES]  # type: ignore[var-annotated]
            start = i % TILES * TILE
            begin = tl.where(here[i // TILES], start, FORM.row_bytes)  # of another rank's expert no byte is read
            w = load_codes(at[0], first_row, begin, OUTPUTS, FORM, R, WARPS, 1, False, WHOLE)
            w_ahead += (w,)  # type: ignore[assignment]
            if SCALED:
                scales = load_scales(
                    at[1], at[2], rows_ptr, first_row, start, OUTPUTS, FORM, R, WARPS, 1, False, G
                )  # fmt: skip
                scales_ahead += (scales,)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_next = load_words(h_ptr, 0, here[0].to(tl.int32), 0, FORM, 1, WARPS)  # type: ignore[misc]
    total = tl.zeros([WARPS, N, 8], tl.float32)
    acc = total
    for i in tl.static_range(STEPS):
        x = x_next
        if i + 1 < STEPS:
            row = h_ptr + (i + 1) // TILES * (FORM.columns // 2)
            x_next = load_words(
                row, (i + 1) % TILES * TILE, here[(i + 1) // TILES].to(tl.int32), 0, FORM, 1, WARPS
            )  # fmt: skip
        scale, zero = first, first
        if SCALED:
            scale, zero = scales_ahead[i]
        acc += tile_sums(w_ahead[i], x, scale, zero, FORM, R, 1, WARPS, G)
        if i + AHEAD < STEPS:
            at = at_experts[(i + AHEAD) // TILES]
            start = (i + AHEAD) % TILES * TILE
            begin = tl.where(here[(i + AHEAD) // TILES], start, FORM.row_bytes)
            w = load_codes(at[0], first_row, begin, OUTPUTS, FORM, R, WARPS, 1, False, WHOLE)
            w_ahead += (w,)  # type: ignore[assignment]
            if SCALED:
                scales = load_scales(
                    at[1], at[2], rows_ptr, first_row, start, OUTPUTS, FORM, R, WARPS, 1, False, G
                )  # fmt: skip
                scales_ahead += (scales,)  # type: ignore[assignment]
        if i % TILES == TILES - 1:
            total += acc * factors[i // TILES][None, :, None]
            acc = tl.zeros([WARPS, N, 8], tl.float32)
    value = tl.sum(tl.sum(total, 0), 1) + bias  # the other rows of x are zeros
    if HAS_SHARED:
        shared = tl.load(shared_ptr + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            shared *= tl.load(shared_factor_ptr)
        value += shared
    finish(value[None, :], tl.arange(0, 1), block, 1, out_ptr, residual_ptr, peers_ptr, epochs_ptr, out_stride,
           residual_stride, row_words, plane_words, OUTPUTS, HAS_RESIDUAL, RANK, WORLD, PEERS)  # fmt: skip
