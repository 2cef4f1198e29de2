"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.runs import as_runs, sum_runs


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    split_stride,
    residual_stride,
    out_stride,
    hidden,
    eps,
    SPLITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = sum_runs(x_ptr + row * x_stride + cols, mask, split_stride, SPLITS)
    value = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * residual_stride + cols
        # Transformers adds in the model's dtype and norms the rounded sum.
        added = (value + tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_ptrs, added, mask=mask)
        value = added.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    if UNIT_OFFSET:
        normed = normed * (1.0 + weight.to(tl.float32))
    else:
        normed = normed.to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, normed.to(x.dtype), mask=mask)


def _launch(
    x_STH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    unit_offset: bool,
    out: torch.Tensor | None,
    pdl: bool,
) -> torch.Tensor:
    splits, rows, hidden = x_STH.shape
    out_TH = torch.empty_like(x_STH[0]) if out is None else out
    if rows == 0:
        return out_TH
    block = next_power_of_2(hidden)
    residual = x_STH[0] if residual_TH is None else residual_TH
    _rms_norm_kernel[(rows,)](
        x_STH,
        residual,
        weight_H,
        out_TH,
        x_STH.stride(1),
        x_STH.stride(0),
        residual.stride(0),
        out_TH.stride(0),
        hidden,
        eps,
        SPLITS=splits,
        HAS_RESIDUAL=residual_TH is not None,
        UNIT_OFFSET=unit_offset,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(pdl),
    )
    return out_TH


def rms_norm(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """RMSNorm over the last dimension, as transformers computes it.

    Sums of squares are taken in float32; the normed value is rounded to x's dtype, then multiplied by the
    weight. With `unit_offset` (Gemma) the factor is 1 + weight, applied in float32 before the one rounding.

    x_TH: [T, H] float32, bfloat16 or float16, rows any stride, columns contiguous. weight_H: [H]. Returns [T,
    H] (`out` when given; it may be x_TH itself).
    """
    return _launch(as_runs(x_TH), None, weight_H, eps, unit_offset, out, pdl)


def add_rms_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """residual_TH += x_TH in place (rounded to x's dtype), then RMSNorm of the sum. Shapes and dtypes as `rms_norm`.

    x_TH may also be the runs [S, T, H] of `split_linear`; their sum is rounded once before it is added.
    """
    return _launch(as_runs(x_TH), residual_TH, weight_H, eps, unit_offset, out, pdl)


def rms_norm_reference(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, *, unit_offset: bool = False
) -> torch.Tensor:
    """`rms_norm` in plain torch, in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    value = x_TH.to(wide)
    normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1 + weight_H.to(wide))).to(x_TH.dtype)
    return normed.to(x_TH.dtype) * weight_H


def add_rms_norm_reference(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> torch.Tensor:
    """`add_rms_norm` in plain torch; writes residual_TH in place too."""
    residual_TH.add_(x_TH)
    return rms_norm_reference(residual_TH, weight_H, eps, unit_offset=unit_offset)
