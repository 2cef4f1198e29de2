"""What an expert does between its two linears."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.arch.block import Activation, Clamped
from tpctl.kernels.common.activation import act


@triton.jit
def gated(gate, up, GATING: tl.constexpr):
    """Of float32 values; GATING: an ``Activation``, or ``Clamped``. What is not a number stays so."""
    if GATING == "silu" or GATING == "gelu_tanh":
        value = act(gate, GATING) * up
    else:
        gate = tl.where(gate > GATING.limit, GATING.limit, gate)
        up = tl.where(up > GATING.limit, GATING.limit, tl.where(up < -GATING.limit, -GATING.limit, up))
        value = (up + 1.0) * gate / (1.0 + tl.exp(gate * -GATING.alpha))
    return value


def gated_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation | Clamped) -> torch.Tensor:
    """`gated` in plain torch, in the dtype of its inputs."""
    if isinstance(activation, Clamped):
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
