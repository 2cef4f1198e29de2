"""The device code of `codes_linear`: x times tiles of codes, which become numbers on the way to the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.codes_kernels import fast_pair, fast_single, lifted, minus_zero, planes, scale_float, unlifted
from tpctl.kernels.common.prefetch import prefetch
from tpctl.kernels.linear.codes_tiles import along, code_rows, number, tile_scales
from tpctl.kernels.linear.epilogue import finish, leave_sums, norm_factor, take_sums

_SCALE_PAIRS = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")


@triton.jit
def normed_pairs(x, factor, UNIT_OFFSET: tl.constexpr):
    """x * factor, or x * (1 + factor), of words of two bfloat16 numbers, rounded once."""
    if UNIT_OFFSET:
        added = x
    else:
        added = tl.full(x.shape, -2147450880, tl.int32)  # -0, twice
    return tl.inline_asm_elementwise(
        _SCALE_PAIRS, "=r,r,r,r", [x, tl.broadcast_to(factor, x.shape), added], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _plain_inputs(
    x_rows,  # [M, 1]
    norm_ptr,
    squares,
    k,
    m_ok,
    COLUMNS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """x at columns k, times the norm's weight, as [K, M], and the squares [M, K] so far with x's own."""
    x = tl.load(x_rows + k[None, :], mask=m_ok[:, None] & (k < COLUMNS)[None, :], other=0.0)
    if HAS_NORM:
        wide = x.to(tl.float32)
        squares += wide * wide
        x = (wide * norm_factor(norm_ptr, k, COLUMNS, UNIT_OFFSET)[None, :]).to(x.dtype)
    return tl.trans(x), squares


@triton.jit
def _inputs(
    x_rows,
    norm_ptr,
    squares,
    at,  # [BYTES], where in a row of bytes
    m_ok,
    FORM: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """The inputs of the codes in bytes ``at``, [BYTES, M]: of packed kinds the even and the odd ones, else twice the
    same; and the squares."""
    COLUMNS: tl.constexpr = FORM.columns
    if FORM.packed and FORM.fast:
        mask = m_ok[:, None]
        if not WHOLE:
            mask &= (at < FORM.row_bytes)[None, :]
        x = tl.load(x_rows + at[None, :], mask=mask, other=0)
        if HAS_NORM:
            low = (x << 16).to(tl.float32, bitcast=True)
            high = (x & -65536).to(tl.float32, bitcast=True)
            squares += low * low + high * high
            factor = tl.load(norm_ptr + at, mask=at < FORM.row_bytes, other=0)
            x = normed_pairs(x, factor[None, :], UNIT_OFFSET)
        even, odd = planes(tl.trans(x))
    elif FORM.packed:
        even, squares = _plain_inputs(x_rows, norm_ptr, squares, 2 * at, m_ok, COLUMNS, HAS_NORM, UNIT_OFFSET)
        odd, squares = _plain_inputs(x_rows, norm_ptr, squares, 2 * at + 1, m_ok, COLUMNS, HAS_NORM, UNIT_OFFSET)
    else:
        even, squares = _plain_inputs(x_rows, norm_ptr, squares, at, m_ok, COLUMNS, HAS_NORM, UNIT_OFFSET)
        odd = even
    return even, odd, squares


@triton.jit
def _add_tile(
    acc,  # [N, M]
    w,  # [N, BYTES]
    even,  # [BYTES, M]
    odd,
    s_rows,
    z_rows,
    groups_ptr,
    at,
    scale,  # [N, GROUPS]
    zero,
    FORM: tl.constexpr,
):
    """acc and the products of a tile: scaled inside of it, on its sums, or (mode "end") not yet."""
    KIND: tl.constexpr = FORM.kind
    high = odd
    if FORM.fast:
        INSIDE: tl.constexpr = FORM.mode == "inside"
        factor = scale if INSIDE else tl.full(scale.shape, 1.0, tl.float32)
        factor = along(lifted(factor, KIND), w.shape[1])
        minus = along(minus_zero(zero, KIND), w.shape[1])
        if FORM.packed:
            low, high = fast_pair(w, minus, factor, KIND, INSIDE)
        else:
            low = fast_single(w, minus, factor, KIND, INSIDE)
    elif FORM.packed:
        low = number(w & 15, s_rows, z_rows, groups_ptr, 2 * at, scale, zero, FORM).to(even.dtype)
        high = number(w >> 4, s_rows, z_rows, groups_ptr, 2 * at + 1, scale, zero, FORM).to(even.dtype)
    else:
        low = number(w, s_rows, z_rows, groups_ptr, at, scale, zero, FORM).to(even.dtype)
    if FORM.mode == "tile":
        part = tl.dot(low, even, input_precision="ieee")
        if FORM.packed:
            part = tl.dot(high, odd, part, input_precision="ieee")
        acc += part * scale
    else:
        acc = tl.dot(low, even, acc, input_precision="ieee")
        if FORM.packed:
            acc = tl.dot(high, odd, acc, input_precision="ieee")
    return acc


@triton.jit
def _codes(w_rows, at, FORM: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        w = tl.load(w_rows + at[None, :], eviction_policy="evict_first")
    else:
        w = tl.load(w_rows + at[None, :], mask=(at < FORM.row_bytes)[None, :], other=0)
    return w


@triton.jit
def tile_sums(
    x_rows,
    norm_ptr,
    w_rows,
    s_rows,
    z_rows,
    up_w_rows,
    up_s_rows,
    up_z_rows,
    groups_ptr,
    start,  # the first byte of a row that is read
    m_ok,
    FORM: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches beyond the input
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums [N, M] over TILES tiles of the gate's rows and of the up half's, and x's squares, [M]."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    squares = tl.zeros([BLOCK_M, BYTES] if HAS_NORM else [1, 1], tl.float32)
    scale, zero = tile_scales(s_rows, z_rows, start, FORM, BYTES, GROUPS)
    up_scale, up_zero = scale, zero
    if GATED:
        up_scale, up_zero = tile_scales(up_s_rows, up_z_rows, start, FORM, BYTES, GROUPS)
    # Scales are read a tile ahead: codes come through shared memory, several tiles ahead, and these do not.
    next_scale, next_zero, next_up_scale, next_up_zero = scale, zero, up_scale, up_zero
    MOVING: tl.constexpr = FORM.mode == "tile" or FORM.mode == "inside"
    # Scales of every input would fill shared memory several times over: they wait for each tile instead.
    AHEAD: tl.constexpr = 1 if FORM.mode == "each" else STAGES
    for i in tl.range(0, TILES, num_stages=AHEAD):
        first = start + i * BYTES
        at = first + tl.arange(0, BYTES)
        if MOVING:
            scale, zero, up_scale, up_zero = next_scale, next_zero, next_up_scale, next_up_zero
            next_scale, next_zero = tile_scales(s_rows, z_rows, first + BYTES, FORM, BYTES, GROUPS)
            if GATED:
                next_up_scale, next_up_zero = tile_scales(up_s_rows, up_z_rows, first + BYTES, FORM, BYTES, GROUPS)
        w = _codes(w_rows, at, FORM, WHOLE)
        even, odd, squares = _inputs(x_rows, norm_ptr, squares, at, m_ok, FORM, WHOLE, HAS_NORM, UNIT_OFFSET)
        acc = _add_tile(acc, w, even, odd, s_rows, z_rows, groups_ptr, at, scale, zero, FORM)
        if GATED:
            w = _codes(up_w_rows, at, FORM, WHOLE)
            up = _add_tile(up, w, even, odd, up_s_rows, up_z_rows, groups_ptr, at, up_scale, up_zero, FORM)
    return acc, up, tl.sum(squares, 1)


@triton.jit
def finished_sums(acc, s_rows, factors_ptr, n, FORM: tl.constexpr):
    """Sums [N, M] as [M, N], times what is the same for a whole row of W."""
    KIND: tl.constexpr = FORM.kind
    SCALES: tl.constexpr = FORM.scales
    factor = tl.full([acc.shape[0], 1], 1.0, tl.float32)
    if FORM.fast:
        factor = unlifted(factor, KIND)
    if FORM.mode == "end":
        factor *= scale_float(tl.load(s_rows), SCALES)
    if FORM.has_factors:
        factor *= tl.load(factors_ptr + n)[:, None]
    return tl.trans(acc * factor)


@triton.jit(do_not_specialize=["rows"])
def codes_linear_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,  # the row of scales of each output
    groups_ptr,
    factors_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    partial_ptr,
    counters_ptr,
    peers_ptr,
    epochs_ptr,
    rows,
    out_features,
    x_stride,
    out_stride,
    residual_stride,
    row_words,
    plane_words,
    eps,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "" for none; else W is [gate; up]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,  # of a row in a tile
    GROUPS: tl.constexpr,  # parts of a row in a tile, each within one scale
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,  # bytes of a row that are asked for while the program waits for x
    RANK: tl.constexpr,
    WORLD: tl.constexpr,  # 1: the result is not sent anywhere
    PEERS: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (FORM.row_bytes + BYTES * SPLIT_K - 1) // (BYTES * SPLIT_K)
    WIDTH: tl.constexpr = 1 if ACTIVATION == "" else 2
    column_block = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(2) * tl.num_programs(0) + column_block
    start = split * (TILES * BYTES)
    # Rows past the end read the last one again: no mask on the codes' loads, and finish drops the results.
    n_safe = tl.minimum(n, out_features - 1)
    w_rows, s_rows, z_rows = code_rows(w_ptr, scales_ptr, zeros_ptr, rows_ptr, n_safe, FORM)
    up_w_rows, up_s_rows, up_z_rows = w_rows, s_rows, z_rows
    if WIDTH == 2:
        up_w_rows, up_s_rows, up_z_rows = code_rows(w_ptr, scales_ptr, zeros_ptr, rows_ptr, out_features + n_safe, FORM)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    targets = m
    if WORLD > 1:
        targets = tl.load(peers_ptr + tl.arange(0, PEERS), mask=tl.arange(0, PEERS) < WORLD, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            last = tl.minimum(start + TILES * BYTES, FORM.row_bytes) - 1
            line = tl.minimum(start + tl.arange(0, PREFETCH // 128) * 128, last)
            prefetch(w_rows + line[None, :])
            if WIDTH == 2:
                prefetch(up_w_rows + line[None, :])
        tl.extra.cuda.gdc_wait()
    epoch = m
    if WORLD > 1:
        epoch = tl.load(epochs_ptr + m, mask=m < rows, other=0) + 1
    acc, up, squares = tile_sums(
        x_rows, norm_ptr, w_rows, s_rows, z_rows, up_w_rows, up_s_rows, up_z_rows, groups_ptr, start, m < rows, FORM,
        FORM.row_bytes % (BYTES * SPLIT_K) == 0, HAS_NORM, UNIT_OFFSET, WIDTH == 2, BLOCK_M, BLOCK_N, BYTES, GROUPS,
        TILES, STAGES
    )  # fmt: skip
    acc = finished_sums(acc, s_rows, factors_ptr, n_safe, FORM)
    if WIDTH == 2:
        up = finished_sums(up, up_s_rows, factors_ptr, out_features + n_safe, FORM)
    else:
        up = acc
    if SPLIT_K == 1:
        scale = tl.full([BLOCK_M], 1.0, tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(squares / FORM.columns + eps)
        finish(acc, up, scale, m, n, column_block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
               residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, RANK,
               WORLD)  # fmt: skip
    else:
        # Every block leaves the same squares at the same place.
        squares_ptr = partial_ptr + SPLIT_K * WIDTH * rows * out_features + m
        if HAS_NORM:
            tl.store(squares_ptr + split * rows, squares, mask=m < rows)
        done = leave_sums(acc, up, m, n, block, split, rows, out_features, partial_ptr, counters_ptr, WIDTH)
        if done == SPLIT_K - 1:  # the program that comes last finishes the block
            acc, up = take_sums(m, n, block, rows, out_features, partial_ptr, counters_ptr, WIDTH, SPLIT_K)
            scale = tl.full([BLOCK_M], 1.0, tl.float32)
            if HAS_NORM:
                squares = tl.zeros([BLOCK_M], tl.float32)
                for s in tl.static_range(SPLIT_K):
                    squares += tl.load(squares_ptr + s * rows, mask=m < rows, other=0.0, cache_modifier=".cg")
                scale = tl.rsqrt(squares / FORM.columns + eps)
            finish(acc, up, scale, m, n, column_block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                   residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, RANK,
                   WORLD)  # fmt: skip
