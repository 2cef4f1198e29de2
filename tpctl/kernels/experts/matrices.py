"""The matrices of a mixture's experts on one rank, as the kernels take them, and the experts in plain torch.

Shape suffixes: T tokens, K experts of a token, E experts here, H hidden size, I (this rank's share of) an expert's
width, F = 2I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.arch.block import Activation, Clamped
from tpctl.kernels.common.codes import Codes, decode
from tpctl.kernels.experts.gating import gated_reference


@dataclass(frozen=True)
class ExpertMatrices:
    """down(activation(gate) * up) of every expert here.

    Attributes:
        gate_up: [E, F, H] contiguous, or codes of it; rows gate, then up, or ``interleaved``: alternating.
        down: [E, H, I] contiguous, or codes.
        gate_up_bias: [E, F].
        down_bias: [E, H]; ``None`` too where another rank adds it.
        first: the number of the first expert here; ids of others add nothing on this rank.
    """

    gate_up: Tensor | Codes
    down: Tensor | Codes
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation | Clamped = "silu"
    interleaved: bool = False
    first: int = 0

    @property
    def count(self) -> int:
        """E."""
        return (self.gate_up.values if isinstance(self.gate_up, Codes) else self.gate_up).shape[0]

    @property
    def width(self) -> int:
        """I."""
        return outputs(self.gate_up) // 2

    @property
    def hidden(self) -> int:
        return outputs(self.down)


@dataclass(frozen=True)
class SharedMatrices:
    """An MLP that every token takes beside its experts: ``gate_up`` [2S, H] (gate, then up) and ``down`` [H, S]."""

    gate_up: Tensor
    down: Tensor


def outputs(matrix: Tensor | Codes) -> int:
    """Rows of each expert's matrix."""
    return matrix.outputs if isinstance(matrix, Codes) else matrix.shape[1]


def experts_reference(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertMatrices, dtype: torch.dtype | None = None
) -> Tensor:
    """[T, H]: the sum of each token's experts, weighed, in ``dtype`` (x's, if it is not given)."""
    dtype = x_TH.dtype if dtype is None else dtype
    x, total = x_TH.to(dtype), x_TH.new_zeros(x_TH.shape, dtype=dtype)
    for expert in range(experts.count):
        tokens, slots = torch.where(ids_TK == experts.first + expert)
        if not len(tokens):
            continue
        gate_up = x[tokens] @ _matrix(experts.gate_up, expert, dtype).T
        if experts.gate_up_bias is not None:
            gate_up += experts.gate_up_bias[expert].to(dtype)
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if experts.interleaved else gate_up.chunk(2, -1)
        y = gated_reference(gate, up, experts.activation) @ _matrix(experts.down, expert, dtype).T
        if experts.down_bias is not None:
            y += experts.down_bias[expert].to(dtype)
        total.index_add_(0, tokens, y * weights_TK[tokens, slots, None].to(dtype))
    return total


def shared_reference(x_TH: Tensor, shared: SharedMatrices, factors_T: Tensor | None = None) -> Tensor:
    """[T, H] of the shared MLP, in x's dtype."""
    gate, up = (x_TH @ shared.gate_up.T.to(x_TH.dtype)).chunk(2, -1)
    y = gated_reference(gate, up, "silu") @ shared.down.T.to(x_TH.dtype)
    return y if factors_T is None else y * factors_T[:, None].to(y.dtype)


def _matrix(matrix: Tensor | Codes, expert: int, dtype: torch.dtype) -> Tensor:
    return decode(matrix.of_expert(expert)).to(dtype) if isinstance(matrix, Codes) else matrix[expert].to(dtype)
