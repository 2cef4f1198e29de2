"""The gated activation of an MLP: act(gate) * up on the merged [gate | up] row."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import launch_options

Activation = Literal["silu", "gelu_tanh"]

_BLOCK = 1024


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    """SiLU or tanh-GELU of a float32 value."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * inner))
    return y


@triton.jit
def _act_and_mul_kernel(
    x_ptr, out_ptr, x_stride, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + cols, mask=mask, other=0.0)
    # Rounded once after the activation, as an unfused module would.
    gated = act(gate.to(tl.float32), ACTIVATION).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, (gated * up.to(tl.float32)).to(gate.dtype), mask=mask)


def act_and_mul(
    x_TF: torch.Tensor,
    *,
    activation: Activation = "silu",
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """act(x[:, :I]) * x[:, I:] for x_TF [T, 2I], columns contiguous. Returns [T, I] in x's dtype."""
    rows, width = x_TF.shape[0], x_TF.shape[1] // 2
    out_TI = x_TF.new_empty((rows, width)) if out is None else out
    if rows == 0:
        return out_TI
    _act_and_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](
        x_TF,
        out_TI,
        x_TF.stride(0),
        out_TI.stride(0),
        width,
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out_TI


def act_and_mul_reference(x_TF: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """`act_and_mul` in plain torch, in x's dtype."""
    gate, up = x_TF.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
