"""The gated activation between the two halves of an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for rows [gate; up]: [T, 2 I] -> [T, I].

    Shazeer, "GLU Variants Improve Transformer" (2020), with SiLU as the gate.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
