"""The layer of latent attention (``arch.latent``): latent vectors, queries, attention over the cache, the output
projection.

    x ─┬─ q_a · norm · q_b ────── rotated ──┐
       └─ kv_a · norm | rotated ── cache ── attention ── o_proj ── partial sum
                                              kv_b

Every rank makes the same latent vectors and keeps them all; queries, ``kv_b`` and ``o_proj`` are those of its own
heads, so nothing is exchanged in between.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.arch import latent, linear
from tpctl.arch.held import Hold
from tpctl.distributed import TPGroup
from tpctl.layers.attention.attention import attention_spec
from tpctl.layers.attention.base import AttentionPlan, AttentionSpec
from tpctl.layers.attention.latent_weights import LatentUp
from tpctl.layers.attention.sdpa_latent import SdpaLatentBackend
from tpctl.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from tpctl.layers.module import attach
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable, apply_rotary
from tpctl.layers.stream import Rows


def spec_of(attention: latent.Attending, rank: int, tp_size: int) -> AttentionSpec:
    """What ``rank`` computes of a layer; of latent attention in its absorbed form, where what the cache keeps is one
    "KV head"."""
    if not isinstance(attention, latent.LatentAttention):
        return attention_spec(attention, rank, tp_size)
    sizes, heads = attention.sizes, len(attention.shares(tp_size)[rank].query)
    return AttentionSpec(heads, 1, sizes.kept, attention.scale, latent=sizes.kv_rank)


class LatentAttention:
    """One rank's heads of one layer. Its weights are under their own names in the block, ``layer``."""

    def __init__(
        self,
        made_of: latent.LatentAttention,
        hold: Hold,
        backend: SdpaLatentBackend,
        rotary: RotaryTable | None,
        group: TPGroup,
        layer: nn.Module,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._backend, self._rotary, self._sizes = backend, rotary, made_of.sizes
        self._down = [ReplicatedLinear(hold(one), dtype) for one in made_of.down]
        self._queries = ColumnParallelLinear(hold(made_of.queries), dtype)
        self._norms = [RMSNorm.of(one, dtype) for one in made_of.norms]
        self._kv_b = LatentUp(hold(made_of.kv_b), made_of.sizes, dtype)
        self.o_proj = RowParallelLinear(hold(made_of.out), group, dtype)
        made: list[tuple[linear.Linear | linear.Norm, nn.Module]] = [
            *zip(made_of.down, self._down, strict=True),
            (made_of.queries, self._queries),
            *zip(made_of.norms, self._norms, strict=True),
            (made_of.kv_b, self._kv_b),
            (made_of.out, self.o_proj),
        ]
        for one, module in made:
            attach(layer, one.name, module)

    def __call__(self, rows: Rows, kv: object, plan: AttentionPlan) -> Tensor:
        """Normed [T, H] -> [T, N * V], what ``o_proj`` takes. ``kv``: the layer's ``LatentKV``."""
        sizes = self._sizes
        made = torch.cat([one(*rows) for one in self._down], dim=-1)
        low, kept_TR, shared_TQ = torch.split(made, [sizes.q_rank or 0, sizes.kv_rank, sizes.rope], dim=-1)
        q = self._queries(*rows) if sizes.q_rank is None else self._queries(self._norms[0](low))
        q_TND = q.view(len(q), -1, sizes.key)
        angles = plan.angles(self._rotary, q.dtype)
        q_TND = torch.cat((q_TND[..., : sizes.nope], self._rotated(q_TND[..., sizes.nope :], angles)), dim=-1)
        shared_T1Q = self._rotated(shared_TQ.unsqueeze(1), angles)
        kept_T1C = torch.cat((self._norms[-1](kept_TR).unsqueeze(1), shared_T1Q), dim=-1)
        return self._backend.run_latent(q_TND, kept_T1C, self._kv_b, kv, plan)

    def _rotated(self, x_TND: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        assert self._rotary is not None and angles is not None
        return apply_rotary(x_TND, *angles, interleaved=self._rotary.interleaved)
