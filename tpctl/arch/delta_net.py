"""Gated delta nets: linear attention whose state is a matrix a value head, in three layers of four of Qwen3-Next.

A key head serves ``group`` value heads, which are next to each other. Two layouts of the input projections exist:

    Qwen3-Next   in_proj_qkvz   for each key head: q, k, its values, their gates z     in_proj_ba   likewise
    Qwen3.5      in_proj_qkv    all q, all k, all values                               in_proj_z, in_proj_b, in_proj_a

The convolution has all q, all k, all values in both. In the second layout value heads are dealt as query heads are,
and key heads as KV heads, which ranks hold copies of where they outnumber them. In the first a key head stays whole.
Either way a rank has whole groups, or a part of one group, and its states need no other rank's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from tpctl.arch.block import Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import MOST_HEADS, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Norm, Vector, below
from tpctl.errors import CheckpointError
from tpctl.partition.cuts import Cut, KVHeads, QueryHeads, Whole
from tpctl.partition.split import Part, Rule

KIND = "gated delta net layers"
DEFAULTS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


@dataclass(frozen=True)
class NetSizes:
    """Heads, their dimensions, and the taps of the convolution: of a net, or of what one rank has of it.

    A state is a matrix [key_dim, value_dim] for each of ``value_heads``, in float32, and the last ``taps - 1`` inputs
    of the convolution's ``channels``, in the model's dtype, with room for one more, which kernels write while others
    still read.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def kept(self) -> tuple[int, int]:
        """Numbers of a state: in its matrices, and inputs of the convolution."""
        return self.value_heads * self.key_dim * self.value_dim, self.taps * self.channels


@dataclass(frozen=True, kw_only=True)
class DeltaNet(Mixer):
    """One that runs.

    Attributes:
        sizes: of all ranks together.
    """

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    sizes: NetSizes

    def sizes_of(self, rank: int, tp_size: int) -> NetSizes:
        """Those of ``rank``. Raises as ``shares``."""
        share, whole = self.shares(tp_size)[rank], self.sizes
        values = len(share.query) * (whole.value_heads // self.num_heads)  # the first layout deals key heads
        return replace(whole, key_heads=len(share.kv), value_heads=values)

    @property
    def projections(self) -> Iterator[Linear]:
        """What reads the hidden state, in order."""
        return (one for one in self.parts if isinstance(one, Linear) and one.rule is not Rule.ROW)

    @property
    def by_key_head(self) -> bool:
        """Whether what belongs to a key head is together, as Qwen3-Next has it."""
        return all(len(one.parts) == 1 and not one.parts[0].label for one in self.projections)

    @property
    def out(self) -> Linear:
        (found,) = (one for one in self.parts if isinstance(one, Linear) and one.rule is Rule.ROW)
        return found

    @property
    def norm(self) -> Norm:
        """Over each value head's output, before its gate."""
        (found,) = (one for one in self.parts if isinstance(one, Norm))
        return found

    @property
    def conv(self) -> Vector:
        """The convolution's weights, [channels, 1, taps]."""
        return self._vectors[0]

    @property
    def decay(self) -> tuple[Vector, Vector]:
        """Of each value head: ``dt_bias``, and ``A_log``."""
        return self._vectors[1], self._vectors[2]

    @property
    def _vectors(self) -> list[Vector]:
        return [one for one in self.parts if isinstance(one, Vector)]


def state_sizes(blueprint: Blueprint, rank: int, tp_size: int) -> list[NetSizes]:
    """What ``rank`` has of each layer that keeps states, in order. Raises as ``DeltaNet.shares``."""
    nets = (layer.mixer for layer in blueprint.layers)
    return [net.sizes_of(rank, tp_size) for net in nets if isinstance(net, DeltaNet)]


def read_sizes(fields: Fields) -> NetSizes:
    """Those of a config. Raises ``CheckpointError`` for a field that is wrong."""
    keys = fields.whole("linear_num_key_heads", most=MOST_HEADS)
    values = fields.whole("linear_num_value_heads", most=MOST_HEADS)
    if values % keys:
        raise CheckpointError(
            f"config.json: linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}"
        )
    return NetSizes(
        keys,
        values,
        fields.whole("linear_key_head_dim"),
        fields.whole("linear_value_head_dim"),
        fields.whole("linear_conv_kernel_dim"),
    )


def by_key_head(net: NetSizes, sizes: Sizes) -> DeltaNet:
    """As Qwen3-Next has it: for at most as many ranks as there are key heads."""
    keys, group = net.key_heads, net.value_heads // net.key_heads

    def heads(rows: int) -> QueryHeads:
        return QueryHeads(keys, keys, rows)

    def linear(name: str, rows: int) -> Linear:
        part = Part(f"linear_attn.{name}", keys * rows, heads(rows))
        return Linear(f"linear_attn.{name}", Rule.COLUMN, (part,), sizes.hidden_size)

    projections = (
        linear("in_proj_qkvz", 2 * net.key_dim + 2 * group * net.value_dim),
        linear("in_proj_ba", 2 * group),
    )
    return _made(net, sizes, projections, heads(net.key_dim), heads(group * net.value_dim), heads(group), keys)


def by_value_head(net: NetSizes, sizes: Sizes) -> DeltaNet:
    """As Qwen3.5 has it: for at most as many ranks as there are value heads."""
    values, keys = net.value_heads, net.key_heads
    key = KVHeads(values, keys, net.key_dim)
    value, each = QueryHeads(values, keys, net.value_dim), QueryHeads(values, keys, 1)

    def linear(name: str, rows: int, cut: Cut) -> Linear:
        part = Part(f"linear_attn.{name}", rows, cut)
        return Linear(f"linear_attn.{name}", Rule.COLUMN, (part,), sizes.hidden_size)

    qkv = below("linear_attn.in_proj_qkv", _sections(net, key, value))
    projections = (
        Linear("linear_attn.in_proj_qkv", Rule.QKV, qkv, sizes.hidden_size),
        linear("in_proj_z", values * net.value_dim, value),
        linear("in_proj_b", values, each),
        linear("in_proj_a", values, each),
    )
    return _made(net, sizes, projections, key, value, each, values)


def _sections(net: NetSizes, key: Cut, value: Cut) -> tuple[tuple[str, int, Cut], ...]:
    keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
    return ("q", keys, key), ("k", keys, key), ("v", values, value)


def _made(
    net: NetSizes, sizes: Sizes, projections: tuple[Linear, ...], key: Cut, value: Cut, each: Cut, num_heads: int
) -> DeltaNet:
    """One whose values, keys, and what there is once for each value head are dealt so."""
    channels, values = 2 * net.key_heads * net.key_dim, net.value_heads * net.value_dim
    out = Part("linear_attn.out_proj", sizes.hidden_size, Whole())
    conv = _sections(net, key, value)
    return DeltaNet(
        KIND,
        (
            *projections,
            Vector("linear_attn.conv1d.weight", channels + values, tail=(1, net.taps), sections=conv),
            Vector("linear_attn.dt_bias", net.value_heads, each),
            Vector("linear_attn.A_log", net.value_heads, each),
            Norm("linear_attn.norm", net.value_dim, sizes.eps),
            Linear("linear_attn.out_proj", Rule.ROW, (out,), values, value),
        ),
        num_heads,
        net.key_heads,
        kept=0,
        recurrent=True,
        sizes=net,
    )
