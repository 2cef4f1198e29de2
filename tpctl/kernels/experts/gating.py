"""What an expert does between its two linears."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.activation import act

Gating = Literal["silu", "gelu_tanh", "clamped"]
"""``act(gate) * up``; or gpt-oss': gate at most 7, up within 7, ``(up + 1) * gate * sigmoid(1.702 * gate)``."""

LIMIT, ALPHA = 7.0, 1.702
_LIMIT, _ALPHA = tl.constexpr(LIMIT), tl.constexpr(ALPHA)


@triton.jit
def gated(gate, up, GATING: tl.constexpr):
    """Of float32 values. What is not a number stays so."""
    if GATING == "clamped":
        gate = tl.where(gate > _LIMIT, _LIMIT, gate)
        up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
        value = (up + 1.0) * gate / (1.0 + tl.exp(gate * -_ALPHA))
    else:
        value = act(gate, GATING) * up
    return value


def gated_reference(gate: torch.Tensor, up: torch.Tensor, gating: Gating) -> torch.Tensor:
    """`gated` in plain torch, in the dtype of its inputs."""
    if gating == "clamped":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return (up + 1) * gate * torch.sigmoid(ALPHA * gate)
    if gating == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
