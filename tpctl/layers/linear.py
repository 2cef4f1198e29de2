"""Linear layers of tensor parallelism.

Every rank holds a slice of ``W`` [out, in] that the partition plan cut; the classes say what its output means:

    ReplicatedLinear          the whole W            y is the whole output
    ColumnParallelLinear      rows of W              y is this rank's slice of the output features
    MergedColumnParallelLinear  rows of several W's, stacked: one GEMM instead of one each
    GatedParallelLinear       rows of W_gate, W_up   y is this rank's slice of silu(gate) * up
    QKVParallelLinear         rows of W_q, W_k, W_v in whole heads, stacked likewise
    RowParallelLinear         columns of W           y is a partial sum: adding up the ranks gives the output

A column-parallel layer followed by a row-parallel one needs no communication in between: what the first leaves
distributed over the features is just what the second wants as its input. One all-reduce ends the pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpctl.distributed import TPGroup
from tpctl.layers.activation import silu_and_mul
from tpctl.layers.gemm import GatedGemm, Gemm, make_gated_gemm, make_gemm


class ReplicatedLinear(nn.Module):
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
        self._gemm: Gemm | None = None

    def optimize(self) -> None:
        """Called once, after loading: pack the weight for the device's fastest GEMM where that pays.

        The packed copy replaces the parameter, so that memory holds the weight once.
        """
        self._gemm = make_gemm(self.weight)
        if self._gemm is not None:
            self._drop_weight()

    def _drop_weight(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [T, in_features] -> [T, out_features]."""
        if self._gemm is not None:
            return self._gemm(x, self.bias)
        return F.linear(x, self.weight, self.bias)


class ColumnParallelLinear(ReplicatedLinear):
    """Rows of W: ``x`` is whole on every rank, ``y`` is this rank's slice of the output features."""


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel weights stacked into one; ``output_sizes`` are their slices on this rank."""

    def __init__(
        self, in_features: int, output_sizes: Sequence[int], bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, sum(output_sizes), bias, dtype)
        self.output_sizes = tuple(output_sizes)


class GatedParallelLinear(MergedColumnParallelLinear):
    """Gate and up projections of a gated MLP, stacked, with the gating: ``silu(gate) * up``.

    Args:
        width: this rank's share of the MLP.
    """

    def __init__(self, in_features: int, width: int, bias: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_features, (width, width), bias, dtype)
        self._gated: GatedGemm | None = None

    def optimize(self) -> None:
        self._gated = make_gated_gemm(self.weight, self.bias)
        if self._gated is not None:
            self._drop_weight()

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [T, in_features] -> [T, width]."""
        if self._gated is not None:
            return self._gated(x)
        return silu_and_mul(super().forward(x))


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
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        super().__init__(in_features, sizes, bias, dtype)


class RowParallelLinear(ReplicatedLinear):
    """Columns of W: ``x`` is this rank's slice of the input features, the ranks' outputs add up to the whole.

    Every rank stores the whole bias, and rank 0 alone adds it: the all-reduce then counts it once.
    """

    def __init__(
        self, in_features: int, out_features: int, group: TPGroup, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.group = group

    def partial(self, x: Tensor) -> Tensor:
        """This rank's partial sum, [T, out_features]; the caller adds the ranks up (see ``RMSNorm.reduce_add``)."""
        bias = self.bias if self.group.rank == 0 else None
        if self._gemm is not None:
            return self._gemm(x, bias)
        return F.linear(x, self.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.partial(x))
