"""The gated MLP of a dense block, and of experts that every token takes."""

from __future__ import annotations

import torch
from torch import Tensor

from tpctl.arch import block
from tpctl.arch.held import Hold
from tpctl.distributed import TPGroup
from tpctl.layers.linear import GatedParallelLinear, RowParallelLinear
from tpctl.layers.module import Layer
from tpctl.layers.stream import Rows
from tpctl.layers.weights.dense import DenseWeight


class MLP(Layer):
    """Gated MLP: merged gate and up (column-parallel), activation, down (row-parallel).

    ``down_proj`` is left to the residual stream that its sum is added to.
    """

    def __init__(self, made_of: block.Gated, hold: Hold, group: TPGroup, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_up_proj = GatedParallelLinear(hold(made_of.gate_up), dtype, made_of.activation)
        self.down_proj = RowParallelLinear(hold(made_of.down), group, dtype)

    def forward(self, rows: Rows) -> Tensor:
        """Normed [T, H] -> [T, I], what ``down_proj`` takes."""
        return self.gate_up_proj(*rows)  # type: ignore[no-any-return]

    def summand(self, rows: Rows) -> tuple[RowParallelLinear, Tensor]:
        """What the residual stream adds: ``down_proj``, of that."""
        return self.down_proj, self(rows)

    def local(self, rows: Rows) -> Tensor:
        """This rank's partial sum of normed [T, H]."""
        return self.down_proj.local(self(rows))

    def plain(self) -> tuple[Tensor, Tensor] | None:
        """Gate and up, [2I, H], and down, [H, I], where nothing but SiLU is between these numbers."""
        gate_up, down = self.gate_up_proj, self.down_proj
        weights = [linear.matrix.weight for linear in (gate_up, down) if isinstance(linear.matrix, DenseWeight)]
        if len(weights) < 2 or gate_up.bias is not None or down.bias is not None or gate_up.activation != "silu":
            return None
        return weights[0], weights[1]
