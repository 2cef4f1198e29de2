"""The gated activation between the two halves of an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpctl.arch.block import Activation, Clamped


def act_and_mul(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """``activation(gate) * up`` for rows [gate; up]: [T, 2 I] -> [T, I].

    Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    acted = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return acted.mul_(up)


def clamped_act_and_mul(gate_up: Tensor, activation: Clamped) -> Tensor:
    """gpt-oss' gated activation, for rows [gate; up]: [T, 2 I] -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + 1) * gate * (gate * activation.alpha).sigmoid()
