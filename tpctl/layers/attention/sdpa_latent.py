"""``sdpa`` with latent attention (``latent_weights``): the cache keeps one vector a token, which all heads share.

It lies in the same paged blocks as keys and values do, as one "KV head" whose values are the first numbers of its keys:
[latent | rotated key]. So slots, block tables, prefix caching and what decodes keep gathered are those of ``sdpa``, and
an absorbed attention is grouped-query attention with one group of all heads. A prompt makes keys and values of latent
vectors, its cached prefix's too, where that is less work (``LatentUp.absorbs``), a few heads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.layers.attention.base import AttentionPlan, AttentionSpec
from tpctl.layers.attention.latent_weights import LatentPreparation, LatentUp
from tpctl.layers.attention.sdpa import SdpaBackend, SdpaPlan
from tpctl.layers.attention.sdpa_cache import PagedKV, Storage
from tpctl.layers.attention.sdpa_prompts import prefill

_MOST_MADE = 1 << 24
"""Numbers of keys and values that are made of latent vectors at once, if it is more than one head's."""


@dataclass(frozen=True)
class LatentKV(PagedKV):
    """``v`` is a view of ``k``: the numbers of a key that are its token's latent vector."""

    def values(self, gathered: Tensor) -> Tensor:
        return gathered[0, ..., : self.spec.latent]


class SdpaLatentBackend(SdpaBackend):
    """Of layers that are latent, all or some."""

    def _layer(self, spec: AttentionSpec, pool: int, storage: Storage, dtype: torch.dtype) -> PagedKV:
        if spec.latent is None:
            return super()._layer(spec, pool, storage, dtype)
        at, latents = storage, storage.rows[..., : spec.latent]
        return LatentKV(spec, at.rows, latents, at.blocks, at.cells, at.first, at.empty_id, at.layer, pool=pool)

    def run_latent(
        self,
        q: Tensor,
        kept_TC: Tensor,
        prepare: LatentPreparation,
        kv_b: LatentUp,
        kv: object,
        plan: AttentionPlan,
    ) -> Tensor:
        """As of ``LatentBackend``."""
        assert isinstance(kv, LatentKV) and isinstance(plan, SdpaPlan)
        angles = plan.angles(prepare.rotary, q.dtype)
        assert angles is not None
        q_TND, kept_T1C = prepare(q, kept_TC, angles)
        self.write(kept_T1C, kv, plan)
        decodes = plan.batch.num_decodes
        out_TNV = q_TND.new_empty(*q_TND.shape[:2], kv_b.sizes.value)
        sums_SNR = self.decodes(kv_b.absorb(q_TND[:decodes]), kv, plan)
        if sums_SNR is not None:
            out_TNV[:decodes] = kv_b.values(sums_SNR)
        for rows, count, cached in plan.batch.prompts():
            if cached is None:
                kept_SLC = kept_T1C[rows].view(count, -1, kv.spec.head_dim)
            else:
                kept_SLC = self.gather_prefix(kv, plan.batch, cached)[0, :, 0]
            self._prompts(q_TND[rows], kept_SLC, kv_b, kv.spec, plan, out_TNV[rows])
        return out_TNV.flatten(1)

    def _prompts(
        self, q_TND: Tensor, kept_SLC: Tensor, kv_b: LatentUp, spec: AttentionSpec, plan: SdpaPlan, out_TNV: Tensor
    ) -> None:
        """The last T / S of each sequence's L tokens, written to ``out_TNV``."""
        count, length, _ = kept_SLC.shape
        if kv_b.absorbs((len(q_TND) // count, length)):
            sums_TNR = q_TND.new_empty(*q_TND.shape[:2], kv_b.sizes.kv_rank)
            kept_S1LC = kept_SLC.unsqueeze(1)
            latents = kept_S1LC[..., : spec.latent]
            q_TNC, biases = kv_b.absorb(q_TND), plan.causal_biases
            prefill(q_TNC, kept_S1LC, latents, spec, biases, sums_TNR, products=self._products)
            out_TNV.copy_(kv_b.values(sums_TNR))
            return
        together = max(1, _MOST_MADE // (count * length * (kv_b.sizes.key + kv_b.sizes.value)))
        for first in range(0, kv_b.num_heads, together):
            heads = slice(first, min(first + together, kv_b.num_heads))
            keys, values = kv_b.expand(kept_SLC, heads)
            plain = AttentionSpec(keys.shape[1], keys.shape[1], kv_b.sizes.key, spec.scale)
            q_TnD, out_TnV, biases = q_TND[:, heads], out_TNV[:, heads], plan.causal_biases
            prefill(q_TnD, keys, values, plain, biases, out_TnV, products=self._products)
