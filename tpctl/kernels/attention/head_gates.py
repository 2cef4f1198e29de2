"""Attention's output gate: what each query head gives, times the sigmoid of a gate that was projected beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import launch_options
from tpctl.kernels.common.runs import as_runs, sum_runs

_BLOCK = 1024


@triton.jit
def head_gates_kernel(
    x_ptr,
    qkv_ptr,
    qkv_stride,
    split_stride,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    behind = at + (at // HEAD_DIM + 1) * HEAD_DIM
    gate = sum_runs(qkv_ptr + row * qkv_stride + behind, inside, split_stride, SPLITS)
    x = tl.load(x_ptr + row * WIDTH + at, mask=inside, other=0.0)
    share = (1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))).to(gate.dtype).to(tl.float32)
    tl.store(x_ptr + row * WIDTH + at, (x.to(tl.float32) * share).to(x.dtype), mask=inside)


def head_gates(x_TF: torch.Tensor, qkv_TF: torch.Tensor, head_dim: int, *, pdl: bool = False) -> torch.Tensor:
    """x_TF [T, N * D], contiguous, times sigmoid(gate) in place.

    qkv_TF: rows that begin with N times [query (D) | its gate (D)], in x's dtype, or runs [S, T, ..] that add up to
    them. The gates' sigmoid is rounded before it is multiplied.
    """
    qkv_STF = as_runs(qkv_TF)
    rows, width = x_TF.shape
    if rows:
        head_gates_kernel[(rows, triton.cdiv(width, _BLOCK))](
            x_TF,
            qkv_STF,
            qkv_STF.stride(1),
            qkv_STF.stride(0),
            SPLITS=qkv_STF.shape[0],
            WIDTH=width,
            HEAD_DIM=head_dim,
            BLOCK=_BLOCK,
            PDL=pdl,
            num_warps=4,
            **launch_options(pdl),
        )
    return x_TF


def head_gates_reference(x_TF: torch.Tensor, qkv_TF: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`head_gates` in plain torch; returns a new tensor."""
    pairs = qkv_TF[:, : 2 * x_TF.shape[1]].unflatten(1, (-1, 2, head_dim))
    return x_TF * pairs[:, :, 1].flatten(1).sigmoid()
