"""The layer on a GPU: projections in one linear, then a launch for one token of each sequence, or three for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn

from tpctl.arch.delta_net import NetSizes
from tpctl.errors import UnsupportedModelError
from tpctl.kernels.common.launch import early_launch, next_power_of_2
from tpctl.kernels.delta_net.chunks import chunks, gated_norm
from tpctl.kernels.delta_net.inputs import NetShape, NetState, NetWeights, Projected
from tpctl.kernels.delta_net.step import MOST_STATE, StepRows, step
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.delta_net.layer import DeltaNet
from tpctl.layers.delta_net.state import LayerState
from tpctl.layers.linear import ReplicatedLinear
from tpctl.layers.stream import Rows
from tpctl.layers.weights.dense import Weight, WeightMaker

_ALIGNED = 16
"""Outputs of the merged linear come in so many, so that rows of them are aligned."""
_NAMES = ("q", "k", "v", "z", "b", "a")


class FusedNet:
    """One rank's heads.

    Raises:
        UnsupportedModelError: their matrices are too large for the kernel that steps.
    """

    def __init__(self, device: WeightMaker, net: DeltaNet) -> None:
        sizes, norm = net.sizes, net.norms[0]
        self._shape = NetShape(sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim, sizes.taps)
        dims = next_power_of_2(sizes.key_dim), next_power_of_2(sizes.value_dim)
        if dims[0] * dims[1] > MOST_STATE:
            raise UnsupportedModelError(
                f"gated delta nets with heads of {sizes.key_dim} x {sizes.value_dim} dimensions do not run on a GPU, "
                f"whose kernels hold {MOST_STATE} numbers of a state; use --device cpu"
            )
        self._weights = NetWeights(net.taps, *net.decay, norm.weight, norm.eps)
        self._linears, self._merged = net.projections, _merged(device, net.projections)
        starts = [0] * len(self._linears)
        if self._merged is not None:
            starts = [0, *accumulate(one.out_features for one in self._linears)][:-1]
        columns = _by_key_head(sizes) if net.by_key_head else _by_part(sizes, self._linears)
        self._columns = {name: (number, starts[number] + begin) for name, (number, begin) in columns.items()}
        values = self._shape.group * sizes.value_dim
        self._steps = sizes.key_dim, values, values, self._shape.group
        if net.by_key_head:
            each = 2 * sizes.key_dim + 2 * values
            self._steps = each, each, each, 2 * self._shape.group

    def __call__(self, rows: Rows, state: LayerState, batch: ForwardBatch) -> Tensor:
        """Normed [T, H] -> [T, N * E]."""
        tables, shape, weights = batch.state_tables, self._shape, self._weights
        assert tables is not None, "sequences of a recurrent model have states"
        projected = self._projected(rows)
        kept, decodes = NetState(state.matrices, state.inputs), batch.num_decodes
        out = rows.x.new_empty(batch.num_tokens, shape.value_heads * shape.value_dim)
        assert batch.seq_lens_S is not None
        reads, writes, copies = tables.rows.unbind(0)
        own = StepRows(reads, writes, copies, batch.seq_lens_S)
        if batch.chunks is not None:  # a captured step, in which the device knows which rows are decodes
            assert tables.chunks is not None
            starts = batch.chunks.query_start_P1
            step(projected, weights, kept, own, shape, out, count_1=starts[:1])
            chunks(projected, weights, kept, tables.chunks, shape, out)
            gated_norm(projected, weights, shape, out, starts)
            return out
        if decodes:
            some, pdl = slice(0, decodes), early_launch(batch.num_tokens, out.device)
            step(projected.rows(some), weights, kept, own, shape, out[some], runs=tables.runs, pdl=pdl)
        if tables.chunks is not None:
            chunks(projected, weights, kept, tables.chunks, shape, out)
            rest = slice(decodes, None)
            gated_norm(projected.rows(rest), weights, shape, out[rest])
        return out

    def _projected(self, rows: Rows) -> Projected:
        if self._merged is not None:
            given = [self._merged.linear(rows.x, None, rows.norm)] * len(self._linears)
        else:
            given = [one(*rows) for one in self._linears]
        q, k, v, z, b, a = (given[number][:, begin:] for number, begin in (self._columns[name] for name in _NAMES))
        return Projected(q, k, v, z, b, a, *self._steps)


def _by_key_head(sizes: NetSizes) -> dict[str, tuple[int, int]]:
    """Qwen3-Next's: what gives each, and where it begins there."""
    dim, group = sizes.key_dim, sizes.value_heads // sizes.key_heads
    values = 2 * dim + group * sizes.value_dim
    return {"q": (0, 0), "k": (0, dim), "v": (0, 2 * dim), "z": (0, values), "b": (1, 0), "a": (1, group)}


def _by_part(sizes: NetSizes, linears: Sequence[ReplicatedLinear]) -> dict[str, tuple[int, int]]:
    """The same of Qwen3.5, whose linears are named after what they give."""
    keys = sizes.key_heads * sizes.key_dim
    numbers = {one.held.linear.name.rpartition("_")[2]: number for number, one in enumerate(linears)}
    found = {name: (numbers[name], 0) for name in ("z", "b", "a")}
    return {"q": (numbers["qkv"], 0), "k": (numbers["qkv"], keys), "v": (numbers["qkv"], 2 * keys), **found}


def _merged(device: WeightMaker, linears: Sequence[ReplicatedLinear]) -> Weight | None:
    """All projections in one, their weights below each other in memory that the linears then share; ``None``: they are
    of codes, or have biases."""
    if not all(one.held.is_dense and one.bias is None for one in linears):
        return None
    rows, first, start = sum(one.out_features for one in linears), linears[0].weight, 0
    merged = first.new_zeros(-(-rows // _ALIGNED) * _ALIGNED, first.shape[1])
    for one in linears:
        part = merged[start : start + one.out_features]
        part.copy_(one.weight)
        one.weight = nn.Parameter(part, requires_grad=False)
        start += one.out_features
    return device.weight(merged)
