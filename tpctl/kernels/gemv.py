"""Linear layers for a handful of rows, with what stands before and after them fused in.

At such batches a linear layer only streams its weights, so cuBLAS's tiles gain nothing and every extra launch
costs. One row runs on the CUDA cores (`_gemv_kernel`), a few on the tensor cores with the weights as the wide
operand (`_skinny_kernel`). `pick` says which, with tuned parameters, or that cuBLAS is faster.

A fused RMSNorm is applied to the sums: its scale is one number a row, so x * norm_weight goes into the
products and the squares of x are summed on the way. That rounds less than norm-then-multiply does, so results
differ from it by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.activation import Activation, act, act_and_mul_reference
from tpctl.kernels.launch import launch_options, next_power_of_2
from tpctl.kernels.norm import rms_norm_reference


class GemvConfig(NamedTuple):
    """Output features and input columns per tile, splits of the input, launch parameters; dot: tensor cores."""

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 1
    dot: bool = False


@triton.jit
def _finish(
    acc,  # [BLOCK_M, BLOCK_N] float32, and the same of the up half
    up,
    scale,  # [BLOCK_M]
    m,
    n,
    rows,
    out_features,
    out_ptr,
    bias_ptr,
    residual_ptr,
    out_stride,
    residual_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
        _finish(acc, up, scale, m, n, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                residual_stride, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _gemv_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    partial_ptr,
    counters_ptr,
    rows,
    out_features,
    x_stride,
    out_stride,
    residual_stride,
    eps,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "" for none; else w is [gate; up]
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (IN_FEATURES + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    block = tl.program_id(0)
    split = tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = split * (TILES * BLOCK_K) + tl.arange(0, BLOCK_K)
    n_ok = n < out_features
    w_row = w_ptr + n.to(tl.int64)[:, None] * IN_FEATURES
    up_row = w_row
    if ACTIVATION != "":
        up_row = w_row + out_features.to(tl.int64) * IN_FEATURES
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = acc
    squares = tl.zeros([BLOCK_K], tl.float32)
    mask = n_ok[:, None] & (k0 < IN_FEATURES)[None, :]
    w_next = tl.load(w_row + k0[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    up_next = w_next
    if ACTIVATION != "":
        up_next = tl.load(up_row + k0[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for i in tl.static_range(TILES):
        k = k0 + i * BLOCK_K
        k_ok = k < IN_FEATURES
        w = w_next.to(tl.float32)
        up = up_next.to(tl.float32)
        if i + 1 < TILES:
            mask = n_ok[:, None] & (k + BLOCK_K < IN_FEATURES)[None, :]
            w_next = tl.load(w_row + (k + BLOCK_K)[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            if ACTIVATION != "":
                up_next = tl.load(up_row + (k + BLOCK_K)[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            factor = tl.load(norm_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
            if UNIT_OFFSET:
                factor += 1.0
            x *= factor
        acc += w * x[None, :]
        if ACTIVATION != "":
            up_acc += up * x[None, :]
    total = tl.sum(acc, 1)[None, :]
    up_total = total
    if ACTIVATION != "":
        up_total = tl.sum(up_acc, 1)[None, :]
    m = tl.arange(0, 1)
    if SPLIT_K == 1:
        scale = tl.full([1], 1.0, tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares, 0) / IN_FEATURES + eps) * scale
        _finish(total, up_total, scale, m, n, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                residual_stride, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)  # fmt: skip
    else:
        _finish_split(total, up_total, m, n, block, split, rows, out_features, x_ptr, out_ptr, bias_ptr, residual_ptr,
                      partial_ptr, counters_ptr, x_stride, out_stride, residual_stride, eps, IN_FEATURES, HAS_BIAS,
                      HAS_RESIDUAL, HAS_NORM, ACTIVATION, SPLIT_K, 1)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    partial_ptr,
    counters_ptr,
    rows,
    out_features,
    x_stride,
    out_stride,
    residual_stride,
    eps,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (IN_FEATURES + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    block = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = split * (TILES * BLOCK_K) + tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m[:, None] * x_stride
    # Rows past the end read the last one again: no mask on the weights' loads, and _finish drops the results.
    n_safe = tl.minimum(n, out_features - 1).to(tl.int64)
    w_rows = w_ptr + n_safe[:, None] * IN_FEATURES
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_acc = acc
    squares = tl.zeros([BLOCK_M], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for i in tl.range(0, TILES, num_stages=STAGES):
        k = k0 + i * BLOCK_K
        x_mask = (m < rows)[:, None]
        if IN_FEATURES % (BLOCK_K * SPLIT_K) == 0:
            w = tl.load(w_rows + k[None, :], eviction_policy="evict_first")
        else:
            x_mask &= (k < IN_FEATURES)[None, :]
            w = tl.load(w_rows + k[None, :], mask=(k < IN_FEATURES)[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(norm_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
            if UNIT_OFFSET:
                factor += 1.0
            x = (wide * factor[None, :]).to(x.dtype)
        x_KM = tl.trans(x)
        acc = tl.dot(w, x_KM, acc, input_precision="ieee")
        if ACTIVATION != "":
            up_rows = w_rows + out_features.to(tl.int64) * IN_FEATURES
            if IN_FEATURES % (BLOCK_K * SPLIT_K) == 0:
                up = tl.load(up_rows + k[None, :], eviction_policy="evict_first")
            else:
                up = tl.load(up_rows + k[None, :], mask=(k < IN_FEATURES)[None, :], other=0.0)
            up_acc = tl.dot(up, x_KM, up_acc, input_precision="ieee")
    acc = tl.trans(acc)
    up_acc = tl.trans(up_acc)
    if SPLIT_K == 1:
        scale = tl.full([BLOCK_M], 1.0, tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(squares / IN_FEATURES + eps)
        _finish(acc, up_acc, scale, m, n, rows, out_features, out_ptr, bias_ptr, residual_ptr, out_stride,
                residual_stride, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)  # fmt: skip
    else:
        _finish_split(acc, up_acc, m, n, block, split, rows, out_features, x_ptr, out_ptr, bias_ptr, residual_ptr,
                      partial_ptr, counters_ptr, x_stride, out_stride, residual_stride, eps, IN_FEATURES, HAS_BIAS,
                      HAS_RESIDUAL, HAS_NORM, ACTIVATION, SPLIT_K, BLOCK_M)  # fmt: skip


# Measured at one row: (out_features, in_features) -> block_n, block_k, split_k, num_warps. Gated ones by their half.
_ONE_ROW: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (4096, 1024): (8, 512, 1, 2),
    (1024, 2048): (8, 2048, 1, 8),
    (1024, 3072): (8, 2048, 1, 8),
    (2048, 1024): (2, 512, 1, 2),
    (1024, 1024): (4, 1024, 1, 4),
    (1024, 1536): (4, 2048, 1, 4),
    (6144, 4096): (2, 2048, 1, 2),
    (4096, 4096): (8, 2048, 1, 8),
    (4096, 14336): (4, 4096, 1, 8),
    (3072, 4096): (8, 1024, 1, 4),
    (4096, 2048): (8, 1024, 1, 4),
    (4096, 7168): (4, 2048, 1, 4),
}
_ONE_ROW_GATED: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (3072, 1024): (2, 512, 1, 1),
    (1536, 1024): (2, 512, 1, 1),
    (14336, 4096): (1, 4096, 1, 4),
    (7168, 4096): (2, 4096, 1, 8),
}
_MAX_SKINNY_ROWS = 16


def pick(rows: int, out_features: int, in_features: int, *, gated: bool = False) -> GemvConfig | None:
    """The tuned configuration for a linear of [out_features, in_features], or None where cuBLAS is faster.

    With `gated`, out_features counts one half of the merged [gate; up] weight.
    """
    if rows == 1:
        found = (_ONE_ROW_GATED if gated else _ONE_ROW).get((out_features, in_features))
        if found is not None:
            return GemvConfig(*found)
        width = next_power_of_2(in_features)
        if out_features >= 32768:  # an lm_head: bandwidth alone
            return GemvConfig(2, width, 1, 4) if 2048 <= width <= 4096 else GemvConfig(2, min(width, 512), 1, 2)
        if gated:
            return GemvConfig(2, min(width, 512), 1, 1) if width <= 1024 else GemvConfig(1, min(width, 4096), 1, 4)
        if width <= 1024:
            return GemvConfig(4, min(width, 512), 1, 1)
        return GemvConfig(4, 2048, 1, 4)
    if rows <= _MAX_SKINNY_ROWS:
        # Bytes in flight decide: 64 x 256 weights three deep; short outputs are split to busy most of the chip.
        block_k = 256
        while block_k > 32 and in_features % block_k:
            block_k //= 2
        blocks = -(-out_features // 64)
        split = 1
        while not gated and split < 8 and blocks * split * 2 <= 132 and in_features >= 1024 * split:
            split *= 2
        return GemvConfig(64, block_k, split, 4, 3, True)
    return None


@dataclass(frozen=True)
class GemvScratch:
    """Device memory that split linears on one stream share: partial sums and counters (zero between calls)."""

    partial: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def allocate(device: torch.device, *, partial_elements: int = 1 << 22, blocks: int = 1 << 14) -> GemvScratch:
        """partial_elements: splits * rows * (1, or 2 gated) * out_features at most. blocks: output blocks at most."""
        return GemvScratch(
            partial=torch.empty(partial_elements, dtype=torch.float32, device=device),
            counters=torch.zeros(blocks, dtype=torch.int32, device=device),
        )


def small_linear(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    scratch: GemvScratch,
    *,
    bias_O: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: GemvConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """residual + act_and_mul(norm(x) @ weight.T + bias), each part optional, in one launch.

    x_TH: [T, H], T <= 64, columns contiguous. weight_OH: [O, H] contiguous, x's dtype. bias_O: [O]. norm:
    (weight [H], eps) of an RMSNorm over x (`unit_offset`: Gemma's 1 + weight). activation: weight_OH is the
    merged [gate; up] and the result act(gate) * up has O / 2 columns. residual_TO: added last; it may be
    `out`. Returns `out`, or a new [T, O] (or [T, O / 2]) in x's dtype. Raises ValueError where `pick` advises
    against and no config is given.
    """
    rows, in_features = x_TH.shape
    out_features = weight_OH.shape[0] // 2 if activation else weight_OH.shape[0]
    if config is None:
        config = pick(rows, out_features, in_features, gated=activation is not None)
        if config is None:
            raise ValueError(f"{rows} rows are too many for small_linear; use torch.nn.functional.linear")
    if out is None:
        out = x_TH.new_empty((rows, out_features))
    if config.split_k > 1:
        needed = config.split_k * rows * weight_OH.shape[0]
        if needed > scratch.partial.numel():
            raise ValueError(f"{needed} partial sums exceed the scratch of {scratch.partial.numel()}")
    args = (
        x_TH,
        weight_OH,
        out,
        bias_O if bias_O is not None else x_TH,
        residual_TO if residual_TO is not None else x_TH,
        norm[0] if norm is not None else x_TH,
        scratch.partial,
        scratch.counters,
        rows,
        out_features,
        x_TH.stride(0),
        out.stride(0),
        residual_TO.stride(0) if residual_TO is not None else 0,
        norm[1] if norm is not None else 0.0,
    )
    flags = {
        "IN_FEATURES": in_features,
        "HAS_BIAS": bias_O is not None,
        "HAS_RESIDUAL": residual_TO is not None,
        "HAS_NORM": norm is not None,
        "UNIT_OFFSET": unit_offset,
        "ACTIVATION": activation or "",
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "PDL": pdl,
        "num_warps": config.num_warps,
        **launch_options(pdl),
    }
    grid = (triton.cdiv(out_features, config.block_n), config.split_k)
    if config.dot:
        block_m = max(16, next_power_of_2(rows))
        _skinny_kernel[grid](*args, BLOCK_M=block_m, STAGES=config.num_stages, **flags)
    else:
        if rows != 1:
            raise ValueError(f"a configuration without dot takes one row, got {rows}")
        _gemv_kernel[grid](*args, **flags)
    return out


def small_linear_reference(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    *,
    bias_O: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """`small_linear` in plain torch: norm, linear, activation and addition one after the other."""
    x = x_TH if norm is None else rms_norm_reference(x_TH, norm[0], norm[1], unit_offset=unit_offset)
    y = torch.nn.functional.linear(x, weight_OH, bias_O)
    if activation is not None:
        y = act_and_mul_reference(y, activation=activation)
    return y if residual_TO is None else residual_TO + y
