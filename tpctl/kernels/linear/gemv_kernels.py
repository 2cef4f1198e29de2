"""The device code of `gemv`: a linear of one to four rows on the CUDA cores, and of a few on the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.prefetch import prefetch
from tpctl.kernels.linear.epilogue import finish, leave_sums, norm_factor, norm_scale, take_sums
from tpctl.kernels.linear.gemv_rows_kernels import sum_rows, weights_tile


@triton.jit
def _start(
    w_ptr, n, split, TILES: tl.constexpr, IN_FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr
):
    """Let the dependents start, ask the L2 cache for PREFETCH tiles behind the first of rows n, and wait for x."""
    LINE: tl.constexpr = 128 // w_ptr.dtype.element_ty.itemsize
    LINES: tl.constexpr = (BLOCK_K + LINE - 1) // LINE
    tl.extra.cuda.gdc_launch_dependents()
    for i in tl.static_range(1, TILES):
        if i <= PREFETCH:
            column = (split * TILES + i) * BLOCK_K + tl.arange(0, LINES) * LINE
            lines = n.to(tl.int64)[:, None] * IN_FEATURES + tl.minimum(column, IN_FEATURES - 1)[None, :]
            prefetch(w_ptr + lines)
    tl.extra.cuda.gdc_wait()


@triton.jit
def _sum_one_row(
    x_ptr,
    w_row,  # [N, 1], and the same of the up half
    up_row,
    norm_ptr,
    w_next,  # the first tiles
    up_next,
    n_ok,
    k0,
    IN_FEATURES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products of x's one row with N rows of weights, on the CUDA cores: [1, N] of the gate, [1, N] of the up half, and
    the sum of x's squares, a scalar."""
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = acc
    squares = tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(TILES):
        k = k0 + i * BLOCK_K
        w = w_next.to(tl.float32)
        up = up_next.to(tl.float32)
        if i + 1 < TILES:
            mask = n_ok[:, None] & (k + BLOCK_K < IN_FEATURES)[None, :]
            w_next, up_next = weights_tile(w_row, up_row, k + BLOCK_K, mask, ACTIVATION)
        x = tl.load(x_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= norm_factor(norm_ptr, k, IN_FEATURES, UNIT_OFFSET)
        acc += w * x[None, :]
        if ACTIVATION != "":
            up_acc += up * x[None, :]
    total = tl.sum(acc, 1)[None, :]
    up_total = total
    if ACTIVATION != "":
        up_total = tl.sum(up_acc, 1)[None, :]
    return total, up_total, tl.sum(squares, 0)


@triton.jit
def _sum_few_rows(
    x_rows,  # [M, 1]
    w_rows,  # [N, 1]
    norm_ptr,
    m,
    k0,
    rows,
    out_features,
    IN_FEATURES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches beyond the input
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same of M rows, [M, N] and [M], on the tensor cores with the weights as the wide operand."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_acc = acc
    squares = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        k = k0 + i * BLOCK_K
        x_mask = (m < rows)[:, None]
        if WHOLE:
            w = tl.load(w_rows + k[None, :], eviction_policy="evict_first")
        else:
            x_mask &= (k < IN_FEATURES)[None, :]
            w = tl.load(w_rows + k[None, :], mask=(k < IN_FEATURES)[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * norm_factor(norm_ptr, k, IN_FEATURES, UNIT_OFFSET)[None, :]).to(x.dtype)
        x_KM = tl.trans(x)
        acc = tl.dot(w, x_KM, acc, input_precision="ieee")
        if ACTIVATION != "":
            up_rows = w_rows + out_features.to(tl.int64) * IN_FEATURES
            if WHOLE:
                up = tl.load(up_rows + k[None, :], eviction_policy="evict_first")
            else:
                up = tl.load(up_rows + k[None, :], mask=(k < IN_FEATURES)[None, :], other=0.0)
            up_acc = tl.dot(up, x_KM, up_acc, input_precision="ieee")
    return tl.trans(acc), tl.trans(up_acc), squares


@triton.jit(do_not_specialize=["rows"])
def small_linear_kernel(
    x_ptr,
    w_ptr,
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
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "" for none; else w is [gate; up]
    BLOCK_M: tl.constexpr,  # 1, 2 or 4 without DOT
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,  # with DOT
    PREFETCH: tl.constexpr,  # without DOT
    EARLY: tl.constexpr,  # without DOT
    RANK: tl.constexpr,
    WORLD: tl.constexpr,  # 1: the result is not sent anywhere
    PEERS: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (IN_FEATURES + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    block = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = split * (TILES * BLOCK_K) + tl.arange(0, BLOCK_K)
    if DOT:
        x_rows = x_ptr + m[:, None] * x_stride
        # Rows past the end read the last one again: no mask on the weights' loads, and finish drops the results.
        n_safe = tl.minimum(n, out_features - 1).to(tl.int64)
        w_rows = w_ptr + n_safe[:, None] * IN_FEATURES
    else:  # such a program reads its first weights while it waits for x
        n_ok = n < out_features
        w_row = w_ptr + n.to(tl.int64)[:, None] * IN_FEATURES
        up_row = w_row
        if ACTIVATION != "":
            up_row = w_row + out_features.to(tl.int64) * IN_FEATURES
        first_mask = n_ok[:, None] & (k0 < IN_FEATURES)[None, :]
        w_first, up_first = weights_tile(w_row, up_row, k0, first_mask, ACTIVATION)
    targets = m
    if WORLD > 1:
        targets = tl.load(peers_ptr + tl.arange(0, PEERS), mask=tl.arange(0, PEERS) < WORLD, other=0)
    if PDL:
        if DOT:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        # ptxas unpacks the first tile, for which it has to be there, before it lets the dependents start, unless a
        # branch (always taken) is in between. Which of the two is faster was measured (docs/kernel-notes.md).
        elif EARLY:
            if rows > 0:
                _start(w_ptr, tl.minimum(n, out_features - 1), split, TILES, IN_FEATURES, BLOCK_K, PREFETCH)
        else:
            _start(w_ptr, tl.minimum(n, out_features - 1), split, TILES, IN_FEATURES, BLOCK_K, PREFETCH)
    # It asks for the residual before its sums: behind them nothing would hide the time until it comes.
    AT_ONCE: tl.constexpr = HAS_RESIDUAL and not DOT and SPLIT_K == 1 and ACTIVATION == ""
    if AT_ONCE:
        residual = tl.load(residual_ptr + m[:, None].to(tl.int64) * residual_stride + n[None, :],
                           mask=(m < rows)[:, None] & (n < out_features)[None, :], other=0.0)  # fmt: skip
    epoch = m
    if WORLD > 1:
        epoch = tl.load(epochs_ptr + m, mask=m < rows, other=0) + 1
    if DOT:
        acc, up, squares = _sum_few_rows(
            x_rows, w_rows, norm_ptr, m, k0, rows, out_features, IN_FEATURES, HAS_NORM, UNIT_OFFSET, ACTIVATION,
            BLOCK_M, BLOCK_N, BLOCK_K, IN_FEATURES % (BLOCK_K * SPLIT_K) == 0, TILES, STAGES
        )  # fmt: skip
    elif BLOCK_M > 1:
        acc, up, squares = sum_rows(
            x_ptr, w_row, up_row, norm_ptr, w_first, up_first, n_ok, k0, m, rows, x_stride, IN_FEATURES, HAS_NORM,
            UNIT_OFFSET, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, TILES
        )  # fmt: skip
    else:
        acc, up, squares = _sum_one_row(
            x_ptr, w_row, up_row, norm_ptr, w_first, up_first, n_ok, k0, IN_FEATURES, HAS_NORM, UNIT_OFFSET,
            ACTIVATION, BLOCK_N, BLOCK_K, TILES
        )  # fmt: skip
    if SPLIT_K == 1:
        scale = tl.full([BLOCK_M], 1.0, tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(squares / IN_FEATURES + eps) * scale
        if AT_ONCE:
            acc = acc * scale[:, None] + residual.to(tl.float32)
            scale = tl.full([BLOCK_M], 1.0, tl.float32)
        finish(acc, up, scale, m, n, block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
               residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL and not AT_ONCE,
               ACTIVATION, RANK, WORLD)  # fmt: skip
    else:
        WIDTH: tl.constexpr = 1 if ACTIVATION == "" else 2
        done = leave_sums(acc, up, m, n, block, split, rows, out_features, partial_ptr, counters_ptr, WIDTH)
        if done == SPLIT_K - 1:  # the program that comes last finishes the block
            acc, up = take_sums(m, n, block, rows, out_features, partial_ptr, counters_ptr, WIDTH, SPLIT_K)
            scale = tl.full([BLOCK_M], 1.0, tl.float32)
            if HAS_NORM:
                scale = norm_scale(x_ptr, m, rows, x_stride, eps, IN_FEATURES, BLOCK_M)
            finish(acc, up, scale, m, n, block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                   residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, RANK,
                   WORLD)  # fmt: skip
