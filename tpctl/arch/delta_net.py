"""Gated delta nets: linear attention whose state is a matrix a value head, in three layers of four of Qwen3-Next.

A key head serves ``group`` value heads, which are next to each other. Two layouts of the input projections exist:

    Qwen3-Next   in_proj_qkvz   for each key head: q, k, its values, their gates z     in_proj_ba   likewise
    Qwen3.5      in_proj_qkv    all q, all k, all values                               in_proj_z, in_proj_b, in_proj_a

The convolution has all q, all k, all values in both. In the second layout value heads are dealt as query heads are,
and key heads as KV heads, which ranks hold copies of where they outnumber them. In the first a key head stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.arch.block import Mixer
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
class DeltaNet:
    """Sizes of one: its heads and their dimensions, and the taps of its convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @classmethod
    def read(cls, fields: Fields) -> DeltaNet:
        """Read them from a config. Raises ``CheckpointError`` for a field that is wrong."""
        keys = fields.whole("linear_num_key_heads", most=MOST_HEADS)
        values = fields.whole("linear_num_value_heads", most=MOST_HEADS)
        if values % keys:
            raise CheckpointError(
                f"config.json: linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}"
            )
        return cls(
            keys,
            values,
            fields.whole("linear_key_head_dim"),
            fields.whole("linear_value_head_dim"),
            fields.whole("linear_conv_kernel_dim"),
        )

    def by_key_head(self, sizes: Sizes) -> Mixer:
        """As Qwen3-Next has it: for at most as many ranks as there are key heads."""
        keys, group = self.key_heads, self.value_heads // self.key_heads

        def heads(rows: int) -> QueryHeads:
            return QueryHeads(keys, keys, rows)

        def linear(name: str, rows: int) -> Linear:
            part = Part(f"linear_attn.{name}", keys * rows, heads(rows))
            return Linear(f"linear_attn.{name}", Rule.COLUMN, (part,), sizes.hidden_size)

        projections = (
            linear("in_proj_qkvz", 2 * self.key_dim + 2 * group * self.value_dim),
            linear("in_proj_ba", 2 * group),
        )
        return self._mixer(sizes, projections, heads(self.key_dim), heads(group * self.value_dim), heads(group), keys)

    def by_value_head(self, sizes: Sizes) -> Mixer:
        """As Qwen3.5 has it: for at most as many ranks as there are value heads."""
        values, keys = self.value_heads, self.key_heads
        key = KVHeads(values, keys, self.key_dim)
        value, each = QueryHeads(values, keys, self.value_dim), QueryHeads(values, keys, 1)

        def linear(name: str, rows: int, cut: Cut) -> Linear:
            part = Part(f"linear_attn.{name}", rows, cut)
            return Linear(f"linear_attn.{name}", Rule.COLUMN, (part,), sizes.hidden_size)

        qkv = below("linear_attn.in_proj_qkv", self._sections(key, value))
        projections = (
            Linear("linear_attn.in_proj_qkv", Rule.QKV, qkv, sizes.hidden_size),
            linear("in_proj_z", values * self.value_dim, value),
            linear("in_proj_b", values, each),
            linear("in_proj_a", values, each),
        )
        return self._mixer(sizes, projections, key, value, each, values)

    def _sections(self, key: Cut, value: Cut) -> tuple[tuple[str, int, Cut], ...]:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return ("q", keys, key), ("k", keys, key), ("v", values, value)

    def _mixer(
        self, sizes: Sizes, projections: tuple[Linear, ...], key: Cut, value: Cut, each: Cut, num_heads: int
    ) -> Mixer:
        """One whose values, keys, and what there is once for each value head are dealt so."""
        channels, values = 2 * self.key_heads * self.key_dim, self.value_heads * self.value_dim
        out = Part("linear_attn.out_proj", sizes.hidden_size, Whole())
        conv = self._sections(key, value)
        return Mixer(
            KIND,
            (
                *projections,
                Vector("linear_attn.conv1d.weight", channels + values, tail=(1, self.taps), sections=conv),
                Vector("linear_attn.dt_bias", self.value_heads, each),
                Vector("linear_attn.A_log", self.value_heads, each),
                Norm("linear_attn.norm", self.value_dim, sizes.eps),
                Linear("linear_attn.out_proj", Rule.ROW, (out,), values, value),
            ),
            num_heads,
            self.key_heads,
            kept=0,
            recurrent=True,
        )
