"""The device code of `codes_gemv`: codes go from memory to registers, become numbers there and meet the tensor cores.

A tile is cut so that nothing moves between threads. Of 8 rows of W a warp's load has 64 bytes each: 4 threads of 16 to
a row, which is where the tensor cores take 8 rows of 64 numbers from, in another order of the inputs; x is loaded in
the same one. Warps of a program take different inputs of the same rows, and their sums are added at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.codes_kernels import fast_pair, fast_single, lifted, minus_zero, planes, scale_float, unlifted
from tpctl.kernels.linear.codes_linear_kernels import normed_pairs
from tpctl.kernels.linear.codes_tiles import as_zero
from tpctl.kernels.linear.epilogue import finish

# Axes of a tile, from the outermost: R groups of 8 rows; WARPS; 8 rows; 4 threads; 16 bytes. A piece is a thread's 16.


@triton.jit
def _row_of(
    piece,
    first_row,
    out_features,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The row of W of pieces of a tile; with WIDTH 2 the second half of R is of the up half."""
    group = piece // (32 * WARPS)
    half = group // (R // WIDTH)
    n = tl.minimum(first_row + group % (R // WIDTH) * 8 + piece // 4 % 8, out_features - 1)
    return half_row(n, half, out_features, INTERLEAVED)


@triton.jit
def half_row(n, half, out_features, INTERLEAVED: tl.constexpr):
    """Where row n of the gate (half 0) or the up half (1) lies in W, which has them one after the other or in turn."""
    if INTERLEAVED:
        row = 2 * n + half
    else:
        row = n + half * out_features
    return row


@triton.jit
def load_codes(
    w_ptr,
    first_row,
    start,
    out_features,
    FORM: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches beyond the input
):
    """The codes of a tile that begins at a row's byte ``start``, [R * WARPS * 512]."""
    at = tl.arange(0, R * WARPS * 512)
    row = _row_of(at // 16, first_row, out_features, R, WARPS, WIDTH, INTERLEAVED).to(tl.int64)
    byte = start + at // 512 % WARPS * 64 + at % 64
    pointers = w_ptr + row * FORM.row_bytes + byte
    if WHOLE:
        w = tl.load(pointers, eviction_policy="evict_first")
    else:
        w = tl.load(pointers, mask=start + at // 512 % WARPS * 64 + at // 16 % 4 * 16 < FORM.row_bytes, other=0)
    return w


@triton.jit
def load_scales(
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    first_row,
    start,
    out_features,
    FORM: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    G: tl.constexpr,
):
    """Scales and zeros of a tile, float32 [R * WARPS * 32 * G]: G of each for every piece."""
    SCALES: tl.constexpr = FORM.scales
    KIND: tl.constexpr = FORM.kind
    at = tl.arange(0, R * WARPS * 32 * G)
    row = _row_of(at // G, first_row, out_features, R, WARPS, WIDTH, INTERLEAVED)
    if FORM.has_rows:
        row = tl.load(rows_ptr + row)
    # Not "+": what Triton knows to be contiguous would be loaded by other threads than those that need it.
    byte = (start + at // (32 * G) % WARPS * 64) ^ (at // G % 4 * 16) ^ (at % G * (16 // G))
    column = tl.minimum((byte + FORM.first_bytes) // FORM.scale_bytes, FORM.scale_columns - 1)
    offset = row.to(tl.int64) * FORM.scale_columns + column
    scale = tl.full(at.shape, 1.0, tl.float32)
    zero = tl.full(at.shape, FORM.zero, tl.float32)
    if FORM.mode != "end":
        scale = scale_float(tl.load(scales_ptr + offset), SCALES)
    if FORM.has_zeros:
        zero = as_zero(tl.load(zeros_ptr + offset), KIND)
    return scale, zero


@triton.jit
def row_factors(
    scales_ptr,
    rows_ptr,
    factors_ptr,
    first_row,
    out_features,
    FORM: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """What the sums of a program's rows are multiplied by, [8 * R]."""
    KIND: tl.constexpr = FORM.kind
    SCALES: tl.constexpr = FORM.scales
    N: tl.constexpr = 8 * R // WIDTH
    at = tl.arange(0, 8 * R)
    row = half_row(tl.minimum(first_row + at % N, out_features - 1), at // N, out_features, INTERLEAVED)
    factors = unlifted(tl.full([8 * R], 1.0, tl.float32), KIND)
    if FORM.mode == "end":
        of = row
        if FORM.has_rows:
            of = tl.load(rows_ptr + row)
        factors *= scale_float(tl.load(scales_ptr + of.to(tl.int64) * FORM.scale_columns), SCALES)
    if FORM.has_factors:
        factors *= tl.load(factors_ptr + row)
    return factors


@triton.jit
def load_words(
    x_ptr,
    start,  # the first byte of a row of codes
    rows,
    x_stride,
    FORM: tl.constexpr,
    MR: tl.constexpr,  # groups of 8 rows of x
    WARPS: tl.constexpr,
):
    """x in words of two inputs, [MR * PARTS * WARPS * 8 * 4 * 4]; PARTS: of how many 16 bytes those are that meet a
    piece."""
    PARTS: tl.constexpr = 4 if FORM.packed else 2
    at = tl.arange(0, MR * PARTS * WARPS * 128)
    row = at // 16 % 8 + at // (128 * WARPS * PARTS) * 8
    byte = start + at // 128 % WARPS * 64 + at // 4 % 4 * 16
    word = byte * PARTS // 4 + at // (128 * WARPS) % PARTS * 4 + at % 4
    mask = (row < rows) & (byte < FORM.row_bytes)
    return tl.load(x_ptr + row.to(tl.int64) * x_stride + word, mask=mask, other=0)


@triton.jit
def _as_inputs(x, FORM: tl.constexpr, MR: tl.constexpr, WARPS: tl.constexpr):
    """Words of x as operands [WARPS, 64, 8 * MR]: of packed kinds the even and the odd inputs, else twice the same."""
    even, odd = planes(x)
    if FORM.packed:
        even = tl.permute(tl.reshape(even, [MR, 4, WARPS, 8, 4, 4]), 2, 1, 4, 5, 0, 3)
        even = tl.reshape(even, [WARPS, 64, 8 * MR])
        odd = tl.permute(tl.reshape(odd, [MR, 4, WARPS, 8, 4, 4]), 2, 1, 4, 5, 0, 3)
        odd = tl.reshape(odd, [WARPS, 64, 8 * MR])
    else:
        even = tl.permute(tl.reshape(tl.join(even, odd), [MR, 2, WARPS, 8, 4, 2, 4]), 2, 1, 5, 4, 6, 0, 3)
        even = tl.reshape(even, [WARPS, 64, 8 * MR])
        odd = even
    return even, odd


@triton.jit
def _as_weights(w, R: tl.constexpr, WARPS: tl.constexpr):
    """Numbers of a tile as an operand [WARPS, 8 * R, 64]."""
    w = tl.permute(tl.reshape(w, [R, WARPS, 8, 4, 4, 4]), 1, 0, 2, 4, 3, 5)
    return tl.reshape(w, [WARPS, 8 * R, 64])


@triton.jit
def _along(value, G: tl.constexpr):
    """G numbers for every piece as one for every byte."""
    spread = tl.broadcast_to(value[:, None], [value.shape[0], 16 // G])
    return tl.reshape(spread, [value.shape[0] * (16 // G)])


@triton.jit
def _to_sums(value, R: tl.constexpr, MR: tl.constexpr, WARPS: tl.constexpr):
    """A number for every piece, of which those of a row are alike, as [WARPS, 8 * R, 8 * MR]."""
    value = tl.permute(tl.reshape(value, [R, WARPS, 8, 4]), 1, 0, 2, 3)
    value = tl.broadcast_to(value[:, :, :, None, :, None], [WARPS, R, 8, MR, 4, 2])
    return tl.reshape(value, [WARPS, 8 * R, 8 * MR])


@triton.jit
def tile_sums(
    w,
    x,
    scale,
    zero,
    FORM: tl.constexpr,
    R: tl.constexpr,
    MR: tl.constexpr,
    WARPS: tl.constexpr,
    G: tl.constexpr,
):
    """A tile's sums [WARPS, 8 * R, 8 * MR]."""
    KIND: tl.constexpr = FORM.kind
    INSIDE: tl.constexpr = FORM.mode == "inside"
    even, odd = _as_inputs(x, FORM, MR, WARPS)
    minus = minus_zero(tl.full(w.shape, FORM.zero, tl.float32), KIND)
    factor = lifted(tl.full(w.shape, 1.0, tl.float32), KIND)
    if FORM.has_zeros:
        minus = _along(minus_zero(zero, KIND), G)
    if INSIDE:
        factor = _along(lifted(scale, KIND), G)
    if FORM.packed:
        low, high = fast_pair(w, minus, factor, KIND, INSIDE)
        part = tl.dot(_as_weights(low, R, WARPS), even)
        part = tl.dot(_as_weights(high, R, WARPS), odd, part)
    else:
        part = tl.dot(_as_weights(fast_single(w, minus, factor, KIND, INSIDE), R, WARPS), even)
    if FORM.mode == "tile":
        part *= _to_sums(scale, R, MR, WARPS)
    return part


@triton.jit
def _squares(x_ptr, m, rows, x_stride, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the squares of rows m of x, of words of two bfloat16 numbers."""
    squares = tl.zeros([m.shape[0]], tl.float32)
    for start in tl.static_range(0, WORDS, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = (m < rows)[:, None] & (k < WORDS)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0)
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -65536).to(tl.float32, bitcast=True)
        squares += tl.sum(low * low + high * high, 1)
    return squares


@triton.jit(do_not_specialize=["rows"])
def codes_gemv_kernel(
    x_ptr,  # words of two bfloat16 numbers
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factors_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,  # words
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
    ACTIVATION: tl.constexpr,
    NORM_ROWS: tl.constexpr,  # 1, or 8 * MR
    MR: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    G: tl.constexpr,
    AHEAD: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PEERS: tl.constexpr,
    PDL: tl.constexpr,
):
    WIDTH: tl.constexpr = 1 if ACTIVATION == "" else 2
    N: tl.constexpr = 8 * R // WIDTH
    TILE: tl.constexpr = 64 * WARPS
    TILES: tl.constexpr = (FORM.row_bytes + TILE - 1) // TILE
    WHOLE: tl.constexpr = FORM.row_bytes % TILE == 0
    SCALED: tl.constexpr = FORM.mode != "end" or FORM.has_zeros
    block = tl.program_id(0)
    first_row = block * N
    m = tl.arange(0, 8 * MR)
    w_ahead = ()
    scales_ahead = ()
    for i in tl.static_range(AHEAD):
        if i < TILES:
            w = load_codes(w_ptr, first_row, i * TILE, out_features, FORM, R, WARPS, WIDTH, False, WHOLE)
            w_ahead += (w,)  # type: ignore[assignment]
            if SCALED:
                scales = load_scales(
                    scales_ptr, zeros_ptr, rows_ptr, first_row, i * TILE, out_features, FORM, R, WARPS, WIDTH, False, G
                )
                scales_ahead += (scales,)  # type: ignore[assignment]
    factors = row_factors(scales_ptr, rows_ptr, factors_ptr, first_row, out_features, FORM, R, WIDTH, False)
    targets = m
    if WORLD > 1:
        targets = tl.load(peers_ptr + tl.arange(0, PEERS), mask=tl.arange(0, PEERS) < WORLD, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = m
    if WORLD > 1:
        epoch = tl.load(epochs_ptr + m, mask=m < rows, other=0) + 1
    x_next = load_words(x_ptr, 0, rows, x_stride, FORM, MR, WARPS)
    if HAS_NORM:
        norm_next = load_words(norm_ptr, 0, rows, 0, FORM, MR, WARPS)
        squares = _squares(x_ptr, tl.arange(0, NORM_ROWS), rows, x_stride, FORM.columns // 2, 2048 // NORM_ROWS)
    acc = tl.zeros([WARPS, 8 * R, 8 * MR], tl.float32)
    for i in tl.static_range(TILES):
        x = x_next
        if HAS_NORM:
            x = normed_pairs(x, norm_next, UNIT_OFFSET)
        if i + 1 < TILES:
            x_next = load_words(x_ptr, (i + 1) * TILE, rows, x_stride, FORM, MR, WARPS)
            if HAS_NORM:
                norm_next = load_words(norm_ptr, (i + 1) * TILE, rows, 0, FORM, MR, WARPS)
        scale, zero = eps, eps
        if SCALED:
            scale, zero = scales_ahead[i]
        acc += tile_sums(w_ahead[i], x, scale, zero, FORM, R, MR, WARPS, G)
        if i + AHEAD < TILES:
            start = (i + AHEAD) * TILE
            w = load_codes(w_ptr, first_row, start, out_features, FORM, R, WARPS, WIDTH, False, WHOLE)
            w_ahead += (w,)  # type: ignore[assignment]
            if SCALED:
                scales = load_scales(
                    scales_ptr, zeros_ptr, rows_ptr, first_row, start, out_features, FORM, R, WARPS, WIDTH, False, G
                )
                scales_ahead += (scales,)  # type: ignore[assignment]
    acc = tl.trans(tl.sum(acc, 0) * factors[:, None])
    up = acc
    if WIDTH == 2:
        acc, up = tl.split(tl.permute(tl.reshape(acc, [8 * MR, 2, N]), 0, 2, 1))
    n = first_row + tl.arange(0, N)
    scale = tl.full([8 * MR], 1.0, tl.float32)
    if HAS_NORM:
        scale *= tl.rsqrt(squares / FORM.columns + eps)
    finish(acc, up, scale, m, n, block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
           residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, RANK,
           WORLD)  # fmt: skip
