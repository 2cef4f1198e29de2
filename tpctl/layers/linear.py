"""Linear layers of tensor parallelism.

Every rank holds a slice of ``W`` [out, in] that the partition plan cut; the classes say what its output means:

    ReplicatedLinear          the whole W            y is the whole output
    ColumnParallelLinear      rows of W              y is this rank's slice of the output features
    MergedColumnParallelLinear  rows of several W's, stacked: one GEMM instead of one each
    GatedParallelLinear       rows of W_gate, W_up   y is this rank's slice of activation(gate) * up
    QKVParallelLinear         rows of W_q, W_k, W_v in whole heads, stacked likewise
    RowParallelLinear         columns of W           y is a partial sum: adding up the ranks gives the output

A column-parallel layer followed by a row-parallel one needs no communication in between: what the first leaves
distributed over the features is just what the second wants as its input. One all-reduce ends the pair.

How the product is computed is the ``Weight``'s matter (``layers.weights``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.arch.block import Activation
from tpctl.distributed import TPGroup
from tpctl.layers.module import Layer
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.dense import DenseWeight, Weight, WeightMaker


class ReplicatedLinear(Layer):
    """``y = x W^T + b`` with the whole weight on every rank; the base of the parallel ones.

    Args:
        in_features, out_features: this rank's sizes, as the plan cut them.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._matrix: Weight | None = None

    @property
    def matrix(self) -> Weight:
        """What multiplies: the device's own once ``use`` was called."""
        return DenseWeight(self.weight) if self._matrix is None else self._matrix

    def use(self, device: WeightMaker) -> None:
        """Called once, after loading: let the device have the weight in its own form.

        A copy in another form replaces the parameter, so that memory holds the weight once.
        """
        self._matrix = self._made_by(device)
        if not isinstance(self._matrix, DenseWeight):
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def _made_by(self, device: WeightMaker) -> Weight:
        return device.weight(self.weight)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """``x``: [T, in_features], ``norm`` still to be applied -> [T, out_features]."""
        return self.matrix.linear(x, self.bias, norm)

    def runs(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """The same, or runs of the input apart, [S, T, out_features], for kernels that add them up as they read."""
        return self.matrix.runs(x, self.bias, norm)


class ColumnParallelLinear(ReplicatedLinear):
    """Rows of W: ``x`` is whole on every rank, ``y`` is this rank's slice of the output features."""


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel weights stacked into one."""


class GatedParallelLinear(MergedColumnParallelLinear):
    """Gate and up projections of a gated MLP, stacked, with the gating: ``activation(gate) * up``.

    Args:
        width: this rank's share of the MLP.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        activation: Activation = "silu",
    ) -> None:
        super().__init__(in_features, 2 * width, bias, dtype)
        self.activation = activation

    def _made_by(self, device: WeightMaker) -> Weight:
        return device.weight(self.weight, gated=True)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """``x``: [T, in_features] -> [T, width]."""
        return self.matrix.gated(x, self.bias, self.activation, norm)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections stacked, cut in whole heads.

    Args:
        num_heads, num_kv_heads: this rank's heads. Where ranks outnumber the KV heads of the model, several ranks
            hold the same KV head.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, (num_heads + 2 * num_kv_heads) * head_dim, bias, dtype)


class RowParallelLinear(ReplicatedLinear):
    """Columns of W: ``x`` is this rank's slice of the input features, the ranks' outputs add up to the whole.

    Every rank stores the whole bias, and rank 0 alone adds it: the all-reduce then counts it once.
    """

    def __init__(
        self, in_features: int, out_features: int, group: TPGroup, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.group = group

    @property
    def summand(self) -> Tensor | None:
        """The bias that this rank adds."""
        return self.bias if self.group.rank == 0 else None

    def partial(self, x: Tensor) -> Tensor:
        """This rank's partial sum, [T, out_features] or runs of it; the caller adds the ranks up."""
        return self.matrix.partial(x, self.summand)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """On one rank: add the output to ``residual`` [T, out_features] in place."""
        self.matrix.add_to(residual, x, self.summand)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """The whole output on every rank."""
        return self.group.all_reduce(self.matrix.linear(x, self.summand, norm))
