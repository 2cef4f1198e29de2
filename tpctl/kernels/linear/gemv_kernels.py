"""The device code of `gemv`: a linear of one row on the CUDA cores, and of a few rows on the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.collective.all_reduce_kernels import send_values
from tpctl.kernels.common.activation import act
from tpctl.kernels.common.prefetch import prefetch


@triton.jit
def _finish(
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
def _norm_scale(x_ptr, m, rows, x_stride, eps, IN_FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
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
def _finish_split(
    acc,
    up,
    m,
    n,
    block,
    split,
    rows,
    out_features,
    x_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    partial_ptr,
    counters_ptr,
    x_stride,
    out_stride,
    residual_stride,
    eps,
    epoch,
    targets,
    row_words,
    plane_words,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
):
    """Leave this split's sums; the program that comes last adds them in order and finishes the block."""
    WIDTH: tl.constexpr = 1 if ACTIVATION == "" else 2
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    offsets = m[:, None] * out_features + n[None, :]
    plane = rows * out_features
    tl.store(partial_ptr + split * WIDTH * plane + offsets, acc, mask=mask)
    if WIDTH == 2:
        tl.store(partial_ptr + (split * WIDTH + 1) * plane + offsets, up, mask=mask)
    tl.debug_barrier()
    done = tl.atomic_add(counters_ptr + block, 1, sem="acq_rel", scope="gpu")
    if done == SPLIT_K - 1:
        tl.store(counters_ptr + block, 0)
        acc = tl.zeros_like(acc)
        up = tl.zeros_like(acc)
        for s in tl.static_range(SPLIT_K):
            acc += tl.load(partial_ptr + s * WIDTH * plane + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            if WIDTH == 2:
                up += tl.load(
                    partial_ptr + (s * WIDTH + 1) * plane + offsets, mask=mask, other=0.0, cache_modifier=".cg"
                )
        scale = tl.full([BLOCK_M], 1.0, tl.float32)
        if HAS_NORM:
            scale = _norm_scale(x_ptr, m, rows, x_stride, eps, IN_FEATURES, BLOCK_M)
        _finish(acc, up, scale, m, n, block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, RANK,
                WORLD)  # fmt: skip


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
def _weights(w_row, up_row, k, mask, ACTIVATION: tl.constexpr):
    """The tile at columns k of [N, 1] rows of weights, and of those of the up half."""
    w = tl.load(w_row + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    up = w
    if ACTIVATION != "":
        up = tl.load(up_row + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return w, up


@triton.jit
def _norm_factor(norm_ptr, k, IN_FEATURES: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    factor = tl.load(norm_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    return factor


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
            w_next, up_next = _weights(w_row, up_row, k + BLOCK_K, mask, ACTIVATION)
        x = tl.load(x_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= _norm_factor(norm_ptr, k, IN_FEATURES, UNIT_OFFSET)
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
            x = (wide * _norm_factor(norm_ptr, k, IN_FEATURES, UNIT_OFFSET)[None, :]).to(x.dtype)
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
    BLOCK_M: tl.constexpr,  # 1 without DOT
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
        # Rows past the end read the last one again: no mask on the weights' loads, and _finish drops the results.
        n_safe = tl.minimum(n, out_features - 1).to(tl.int64)
        w_rows = w_ptr + n_safe[:, None] * IN_FEATURES
    else:  # one row's program reads its first weights while it waits for x
        n_ok = n < out_features
        w_row = w_ptr + n.to(tl.int64)[:, None] * IN_FEATURES
        up_row = w_row
        if ACTIVATION != "":
            up_row = w_row + out_features.to(tl.int64) * IN_FEATURES
        first_mask = n_ok[:, None] & (k0 < IN_FEATURES)[None, :]
        w_first, up_first = _weights(w_row, up_row, k0, first_mask, ACTIVATION)
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
    epoch = m
    if WORLD > 1:
        if DOT:
            epoch = tl.load(epochs_ptr + m, mask=m < rows, other=0) + 1
        else:
            epoch = tl.load(epochs_ptr + m) + 1
    if DOT:
        acc, up, squares = _sum_few_rows(
            x_rows, w_rows, norm_ptr, m, k0, rows, out_features, IN_FEATURES, HAS_NORM, UNIT_OFFSET, ACTIVATION,
            BLOCK_M, BLOCK_N, BLOCK_K, IN_FEATURES % (BLOCK_K * SPLIT_K) == 0, TILES, STAGES
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
        _finish(acc, up, scale, m, n, block, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                residual_stride, epoch, targets, row_words, plane_words, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, RANK,
                WORLD)  # fmt: skip
    else:
        _finish_split(acc, up, m, n, block, split, rows, out_features, x_ptr, out_ptr, bias_ptr, residual_ptr,
                      partial_ptr, counters_ptr, x_stride, out_stride, residual_stride, eps, epoch, targets, row_words,
                      plane_words, IN_FEATURES, HAS_BIAS, HAS_RESIDUAL, HAS_NORM, ACTIVATION, SPLIT_K, BLOCK_M,
                      RANK, WORLD)  # fmt: skip
