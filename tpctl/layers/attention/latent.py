"""The layer of latent attention (``arch.latent``): latent vectors, queries, attention over the cache, the output
projection.

    x ─┬─ q_a · norm · q_b ────── rotated ──┐
       └─ kv_a · norm | rotated ── cache ── attention ── o_proj ── partial sum
                                              kv_b

Every rank makes the same latent vectors and keeps them all; queries, ``kv_b`` and ``o_proj`` are those of its own
heads, so nothing is exchanged in between.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tpctl.arch import latent, linear
from tpctl.arch.held import Hold
from tpctl.distributed import TPGroup
from tpctl.layers.attention.attention import attention_spec
from tpctl.layers.attention.base import AttentionPlan, AttentionSpec
from tpctl.layers.attention.latent_weights import LatentPreparation, LatentUp
from tpctl.layers.linear import ColumnParallelLinear, MergedLinear, ReplicatedLinear, RowParallelLinear, merged
from tpctl.layers.module import attach
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable
from tpctl.layers.stream import Rows
from tpctl.layers.weights.dense import WeightMaker


def spec_of(attention: latent.Attending, rank: int, tp_size: int) -> AttentionSpec:
    """What ``rank`` computes of a layer; of latent attention in its absorbed form, where what the cache keeps is one
    "KV head"."""
    if not isinstance(attention, latent.LatentAttention):
        return attention_spec(attention, rank, tp_size)
    sizes, heads = attention.sizes, len(attention.shares(tp_size)[rank].query)
    return AttentionSpec(heads, 1, sizes.kept, attention.scale, latent=sizes.kv_rank, made=sizes.made)


@runtime_checkable
class LatentBackend(Protocol):
    """An attention backend whose cache keeps latent vectors."""

    def run_latent(
        self, q: Tensor, kept_TC: Tensor, prepare: LatentPreparation, kv_b: LatentUp, kv: Any, plan: Any
    ) -> Tensor:
        """[T, N * V]: attention of one layer, of what is projected, [T, N * (P + Q)] and [T, R + Q].

        Args:
            kv: the layer's cache. plan: the step, as ``begin`` gave it.
        """
        ...


class LatentAttention:
    """One rank's heads of one layer. Its weights are under their own names in the block, ``layer``."""

    def __init__(
        self,
        made_of: latent.LatentAttention,
        hold: Hold,
        backend: LatentBackend,
        rotary: RotaryTable,
        group: TPGroup,
        layer: nn.Module,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._backend, self._sizes = backend, made_of.sizes
        self._down = [ReplicatedLinear(hold(one), dtype) for one in made_of.down]
        self._queries = ColumnParallelLinear(hold(made_of.queries), dtype)
        self._norms = [RMSNorm.of(one, dtype) for one in made_of.norms]
        self._kv_b = LatentUp(hold(made_of.kv_b), made_of.sizes, dtype)
        self.o_proj = RowParallelLinear(hold(made_of.out), group, dtype)
        self._merged: MergedLinear | None = None
        self._prepare = LatentPreparation(made_of.sizes, self._norms[-1], rotary)
        made: list[tuple[linear.Linear | linear.Norm, nn.Module]] = [
            *zip(made_of.down, self._down, strict=True),
            (made_of.queries, self._queries),
            *zip(made_of.norms, self._norms, strict=True),
            (made_of.kv_b, self._kv_b),
            (made_of.out, self.o_proj),
        ]
        for one, module in made:
            attach(layer, one.name, module)

    def merge(self, maker: WeightMaker) -> None:
        """Once, after loading: let what reads the hidden state be one weight, of which its parts are views."""
        first = [self._queries] if self._sizes.q_rank is None else []
        self._merged = merged([*first, *self._down], maker)

    def _read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """What is made of the hidden state: queries or the vector that they are made of; and [T, R + Q]."""
        kept = self._sizes.kept
        if self._merged is not None:
            made = self._merged(*rows)
        elif len(self._down) > 1 or self._sizes.q_rank is None:
            first = self._queries if self._sizes.q_rank is None else self._down[0]
            return first(*rows), self._down[-1](*rows)
        else:
            made = self._down[0](*rows)
        return made[:, :-kept], made[:, -kept:]

    def __call__(self, rows: Rows, kv: object, plan: AttentionPlan) -> Tensor:
        """Normed [T, H] -> [T, N * V], what ``o_proj`` takes. ``kv``: the layer's cache."""
        q, kept_TC = self._read(rows)
        if self._sizes.q_rank is not None:
            q = self._queries(q, self._norms[0])
        return self._backend.run_latent(q, kept_TC, self._prepare, self._kv_b, kv, plan)
