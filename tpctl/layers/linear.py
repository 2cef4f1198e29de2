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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tpctl.arch.block import Activation
from tpctl.arch.held import HeldLinear
from tpctl.distributed import TPGroup
from tpctl.kernels.common.codes import Codes, decode
from tpctl.layers.module import Layer
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.codes import CodesWeight, joined
from tpctl.layers.weights.dense import DenseWeight, Weight, WeightMaker
from tpctl.layers.weights.stored import to_codes


def declare(layer: nn.Module, held: HeldLinear, dtype: torch.dtype | None, prefix: str = "") -> None:
    """Give ``layer`` an empty parameter for every tensor of ``held``, named ``prefix`` and its kind; codes have
    whatever dtype a shard has them in."""
    for kind, shape in held.shapes.items():
        empty = torch.empty(shape, dtype=torch.uint8 if kind in held.kept else dtype)
        layer.register_parameter(prefix + kind, nn.Parameter(empty, requires_grad=False))


def emptied(layer: nn.Module, name: str) -> None:
    """Leave nothing of a parameter whose values are elsewhere now."""
    setattr(layer, name, nn.Parameter(getattr(layer, name).new_empty(0), requires_grad=False))


class ReplicatedLinear(Layer):
    """``y = x W^T + b`` with the whole weight on every rank; the base of the parallel ones.

    Args:
        held: what this rank has of it, as the plan cut it.
        dtype: of weights that are floats, and of the bias.

    Attributes:
        in_features, out_features: this rank's.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, held: HeldLinear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.held = held
        self.in_features, self.out_features = held.in_features, held.out_features
        declare(self, held, dtype)
        if "bias" not in held.shapes:
            self.bias = None
        self.dtype = dtype
        self._matrix: Weight | None = None

    @property
    def matrix(self) -> Weight:
        """What multiplies: the device's own once ``use`` was called."""
        if self._matrix is None and not self.held.is_dense:
            self._matrix = joined(map(CodesWeight, self._codes()))
        return DenseWeight(self.weight) if self._matrix is None else self._matrix

    def use(self, device: WeightMaker) -> None:
        """Called once, after loading: let the device have the weight in its own form.

        A copy in another form replaces the parameters, so that memory holds the weight once.
        """
        self._matrix = self._made_by(device)
        if not isinstance(self._matrix, DenseWeight):
            for kind in self.held.shapes.keys() - {"bias"}:
                emptied(self, kind)

    def _made_by(self, device: WeightMaker, *, gated: bool = False) -> Weight:
        if self.held.is_dense:
            return device.weight(self.weight, gated=gated)
        codes = self._codes()
        return joined(device.codes(one, gated=gated and len(codes) == 1) for one in codes)

    def _codes(self) -> tuple[Codes, ...]:
        return to_codes(self.held, {entry.name: getattr(self, entry.name) for entry in self.held.codes()})

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """``x``: [T, in_features], ``norm`` still to be applied -> [T, out_features]."""
        return self.matrix.linear(x, self.bias, norm)

    def runs(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """The same, or runs of the input apart, [S, T, out_features], for kernels that add them up as they read."""
        return self.matrix.runs(x, self.bias, norm)


class MergedLinear:
    """Linears of the same rows as one: ``y`` is what they give, beside each other."""

    def __init__(self, matrix: Weight, bias: Tensor | None) -> None:
        self._matrix, self._bias = matrix, bias

    def __call__(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """``x``: [T, in_features], ``norm`` still to be applied."""
        return self._matrix.linear(x, self._bias, norm)


def merged(linears: Sequence[ReplicatedLinear], device: WeightMaker) -> MergedLinear | None:
    """Linears of the same rows as one, after loading, where all are dense; their weights become views of that one's."""
    if len(linears) < 2 or not all(one.held.is_dense for one in linears):
        return None
    weight = torch.cat([one.weight for one in linears])
    bias = None
    if any(one.bias is not None for one in linears):
        bias = torch.cat([weight.new_zeros(one.out_features) if one.bias is None else one.bias for one in linears])
    first = 0
    for one in linears:
        one.weight = nn.Parameter(weight[first : first + one.out_features], requires_grad=False)
        one.use(device)
        first += one.out_features
    return MergedLinear(device.weight(weight), bias)


class NumbersLinear(ReplicatedLinear):
    """One whose weight is read as it is, not only multiplied by: of a quantised one the numbers, made once."""

    def use(self, device: WeightMaker) -> None:
        """Once, after loading."""
        if self.held.is_dense:
            return
        numbers = torch.cat([decode(codes, dtype=self.dtype or torch.float32) for codes in self._codes()])
        for kind in self.held.shapes.keys() - {"bias"}:
            emptied(self, kind)
        self.weight = nn.Parameter(numbers, requires_grad=False)


class ColumnParallelLinear(ReplicatedLinear):
    """Rows of W: ``x`` is whole on every rank, ``y`` is this rank's slice of the output features."""


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel weights stacked into one."""


class GatedParallelLinear(MergedColumnParallelLinear):
    """Gate and up projections of a gated MLP, stacked, with the gating: ``activation(gate) * up``."""

    def __init__(self, held: HeldLinear, dtype: torch.dtype | None = None, activation: Activation = "silu") -> None:
        super().__init__(held, dtype)
        self.activation = activation

    def _made_by(self, device: WeightMaker, *, gated: bool = True) -> Weight:
        return super()._made_by(device, gated=gated)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """``x``: [T, in_features] -> [T, width]."""
        return self.matrix.gated(x, self.bias, self.activation, norm)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections stacked, cut in whole heads. Where ranks outnumber the KV heads of the model,
    several ranks hold the same KV head."""


class RowParallelLinear(ReplicatedLinear):
    """Columns of W: ``x`` is this rank's slice of the input features, the ranks' outputs add up to the whole.

    Every rank stores the whole bias, and rank 0 alone adds it: the all-reduce then counts it once.
    """

    def __init__(self, held: HeldLinear, group: TPGroup, dtype: torch.dtype | None = None) -> None:
        super().__init__(held, dtype)
        self.group = group

    @property
    def summand(self) -> Tensor | None:
        """The bias that this rank adds."""
        return self.bias if self.held.adds_bias else None

    def partial(self, x: Tensor) -> Tensor:
        """This rank's partial sum, [T, out_features] or runs of it; the caller adds the ranks up."""
        return self.matrix.partial(x, self.summand)

    def local(self, x: Tensor) -> Tensor:
        """This rank's partial sum, [T, out_features]."""
        return self.matrix.linear(x, self.summand)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """On one rank: add the output to ``residual`` [T, out_features] in place."""
        self.matrix.add_to(residual, x, self.summand)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """The whole output on every rank."""
        return self.group.all_reduce(self.matrix.linear(x, self.summand, norm))
