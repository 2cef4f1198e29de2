"""Latent attention (``latent_weights``) by tpctl's own Triton kernels.

The cache has one row a token, [latent | rotated key], in the usual paged blocks. Decodes attend to these rows absorbed,
and so do prompts in a captured step, whose lengths are not part of the graph. Other prompts make keys and values of the
rows that they read, a few heads at a time, where that is less work (``LatentUp.absorbs``) and there is memory for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpctl.accounting import KvLayout, LayerPools, latent_room
from tpctl.kernels.attention.latent_decode import LatentPlan, LatentScratch, latent_decode
from tpctl.kernels.attention.latent_plain import latent_plain
from tpctl.kernels.attention.latent_prefill import latent_prefill
from tpctl.kernels.attention.latent_prepare import LatentShape, latent_prepare
from tpctl.kernels.attention.latent_values import latent_values
from tpctl.kernels.common.launch import early_launch, has_pdl
from tpctl.layers.attention.base import AttentionSpec, LayerKV
from tpctl.layers.attention.latent_weights import LatentPreparation, LatentUp
from tpctl.layers.attention.paged import PagedBackend, PagedPlan
from tpctl.layers.batch import ForwardBatch, PrefillChunks


class _Contexts(NamedTuple):
    """What a step's prompts read: int64 [L], the cache's rows of all their tokens, one sequence after the other, and
    int32 [P + 1], where each begins."""

    rows_L: Tensor
    starts_P1: Tensor


@dataclass
class LatentStep(PagedPlan):
    """A step. ``decodes`` is how its decodes are divided, if there are any."""

    decodes: LatentPlan | None
    block_size: int

    @cached_property
    def lens(self) -> list[int]:
        """Tokens of each prompt's sequence."""
        return self.batch.seq_lens[self.batch.num_decodes :]

    @cached_property
    def contexts(self) -> _Contexts:
        chunks, total = self.prefill_chunks, sum(self.lens)
        ends_P = chunks.seq_lens_P.cumsum(0)
        starts_P1 = torch.nn.functional.pad(ends_P, (1, 0))
        numbers = torch.arange(len(ends_P), device=ends_P.device)
        sequence_L = torch.repeat_interleave(numbers, chunks.seq_lens_P, output_size=total)
        position_L = torch.arange(total, device=ends_P.device) - starts_P1[sequence_L]
        blocks_L = chunks.block_tables[0][sequence_L, position_L // self.block_size].long()
        return _Contexts(blocks_L * self.block_size + position_L % self.block_size, starts_P1.int())


class TritonLatentBackend(PagedBackend[LatentStep]):
    """Of layers that are all latent, and alike; ``dtype`` is the model's."""

    name = "triton"
    captures_prefill = True

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        block_size: int,
        pools: LayerPools | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(layers, block_size, pools)
        (self._spec,) = set(layers)
        assert self._spec.latent is not None
        self._rank, self._dtype = self._spec.latent, dtype
        self._made: tuple[Tensor, Tensor] | None = None  # what prompts read, [tokens, R + Q], and what they make of it
        self._scratch: LatentScratch | None = None
        self._plans: dict[int, LatentPlan] = {}

    def allocate(
        self, num_slabs: int, dtype: torch.dtype, device: torch.device, layout: KvLayout | None = None
    ) -> list[LayerKV]:
        shapes = [(self.block_size, spec.head_dim) for spec in self.layers]
        caches = self.vectors(shapes, 1, num_slabs, dtype, device, layout)
        return [LayerKV(spec, rows, rows[..., : self._rank]) for spec, (rows,) in zip(self.layers, caches, strict=True)]

    def reserve(self, step: int, max_model_len: int, device: torch.device) -> None:
        """Keep memory for the parts that decodes leave, and for the keys and values that prompts make."""
        spec = self._spec
        self._scratch = LatentScratch.allocate(spec.num_heads, self._rank, device)
        room = latent_room(step, max_model_len, spec.head_dim, spec.num_heads * spec.made)
        memory = torch.empty(room.read + room.made, dtype=self._dtype, device=device)
        self._made = memory[: room.read].view(room.tokens, -1), memory[room.read :]

    def share(self, other: PagedBackend[Any]) -> None:
        if isinstance(other, TritonLatentBackend) and other._spec == self._spec:
            self._scratch, self._made = other._scratch, other._made

    def begin(self, batch: ForwardBatch) -> LatentStep:
        decodes = None
        if batch.num_decodes:
            assert batch.seq_lens_S is not None
            decodes = self._plan(batch.num_decodes, batch.seq_lens_S.device)
            decodes.update(batch.seq_lens_S[: batch.num_decodes])
        return LatentStep(batch, decodes, self.block_size)

    def _plan(self, count: int, device: torch.device) -> LatentPlan:
        """The plan for ``count`` decodes: kept, since captured graphs hold its buffers."""
        found, spec = self._plans.get(count), self._spec
        if found is None:
            if self._scratch is None:
                self._scratch = LatentScratch.allocate(spec.num_heads, self._rank, device)
            rope, size = spec.head_dim - self._rank, self._dtype.itemsize
            found = self._plans[count] = LatentPlan(
                count, spec.num_heads, self._rank, rope, self.block_size, self._scratch, itemsize=size
            )
        return found

    def run_latent(
        self, q: Tensor, kept_TC: Tensor, prepare: LatentPreparation, kv_b: LatentUp, kv: LayerKV, plan: LatentStep
    ) -> Tensor:
        """As of ``LatentBackend``."""
        batch, one, weight = plan.batch, prepare.sizes, kv_b.weight
        pdl = early_launch(batch.num_tokens, q.device)
        shape = LatentShape(one.kv_rank, one.nope, one.rope, one.value)
        count = batch.num_decodes if self._makes(kv_b, plan) else batch.num_tokens  # rows that are absorbed
        q_SNC, rotated_TNQ = latent_prepare(
            q,
            kept_TC,
            weight,
            kv.k,
            (prepare.norm.weight, prepare.norm.eps),
            (prepare.rotary.cos, prepare.rotary.sin),
            batch.rope_positions,
            batch.pools[0].slot_mapping,
            shape,
            num_absorbed=count,
            interleaved=prepare.rotary.interleaved,
            pdl=pdl,
        )
        out = q.new_empty(batch.num_tokens, kv_b.num_heads * one.value)
        if count:
            latent_values(self._sums(q_SNC, kv, plan), weight, shape, out=out[:count], pdl=pdl)
        if count < batch.num_tokens:
            self._plain(q[count:], rotated_TNQ, kv_b, shape, kv, plan, out[count:])
        return out

    def _sums(self, q_TNC: Tensor, kv: LayerKV, plan: LatentStep) -> Tensor:
        """[T, N, R]: weighted sums of latent vectors for absorbed queries, of the decodes or of the whole step."""
        batch = plan.batch
        assert batch.seq_lens_S is not None
        decodes, sums_TNR = batch.num_decodes, q_TNC.new_empty(*q_TNC.shape[:2], self._rank)
        if batch.chunks is not None:
            self.decode_and_prefill(q_TNC, kv, plan, batch.chunks, sums_TNR, None)
            return sums_TNR
        if decodes:
            tables, lens = batch.pools[0].block_tables[:decodes], batch.seq_lens_S[:decodes]
            self.decode(q_TNC[:decodes], kv, tables, lens, plan, sums_TNR[:decodes], None)
        if decodes < len(q_TNC):
            self.prefill(q_TNC[decodes:], kv, plan, sums_TNR[decodes:], None)
        return sums_TNR

    def decode(
        self,
        q_SND: Tensor,
        kv: LayerKV,
        tables_SM: Tensor,
        lens_S: Tensor,
        plan: LatentStep,
        out_SND: Tensor,
        sinks_N: Tensor | None,
    ) -> None:
        assert plan.decodes is not None and sinks_N is None
        pdl = has_pdl(q_SND.device)
        latent_decode(q_SND, kv.k, tables_SM, lens_S, plan.decodes, scale=kv.spec.scale, out=out_SND, pdl=pdl)

    def prefill(self, q_TND: Tensor, kv: LayerKV, plan: LatentStep, out_TND: Tensor, sinks_N: Tensor | None) -> None:
        self.prefill_pages(q_TND, kv, plan.prefill_chunks, out_TND, sinks_N)

    def prefill_pages(
        self, q_TNC: Tensor, kv: LayerKV, chunks: PrefillChunks, out_TNR: Tensor, sinks_N: Tensor | None
    ) -> None:
        latent_prefill(
            q_TNC,
            kv.k,
            chunks.block_tables[0],
            chunks.query_start_P1,
            chunks.seq_lens_P,
            self._rank,
            scale=kv.spec.scale,
            out=out_TNR,
        )

    def _makes(self, kv_b: LatentUp, plan: LatentStep) -> bool:
        """Whether a step's prompts make keys and values, for which there is memory and which is less work."""
        batch, decodes = plan.batch, plan.batch.num_decodes
        if self._made is None or batch.chunks is not None or decodes == batch.num_tokens:
            return False
        read, made = self._made
        total = sum(plan.lens)
        fits = total <= len(read) and total * self._spec.made <= len(made)
        return fits and not kv_b.absorbs(*zip(batch.query_lens[decodes:], plan.lens, strict=True))

    def _plain(
        self,
        q_TF: Tensor,
        rotated_TNQ: Tensor,
        kv_b: LatentUp,
        shape: LatentShape,
        kv: LayerKV,
        plan: LatentStep,
        out_TF: Tensor,
    ) -> None:
        """The prompts' rows [T, N * (P + Q)], of which what is rotated lies apart, into [T, N * V]."""
        assert self._made is not None
        rows_L, starts_P1 = plan.contexts
        read_LC, buffer = self._made[0][: len(rows_L)], self._made[1]
        torch.index_select(kv.k.view(-1, kv.spec.head_dim), 0, rows_L, out=read_LC)
        num_heads, made = kv_b.num_heads, shape.nope + shape.value
        q_TND, out_TNV = q_TF.view(len(q_TF), num_heads, -1), out_TF.view(len(q_TF), num_heads, -1)
        together = max(1, min(num_heads, len(buffer) // (len(rows_L) * made)))
        for first in range(0, num_heads, together):
            heads = slice(first, min(first + together, num_heads))
            weight = kv_b.weight[heads.start * made : heads.stop * made]
            made_LF = buffer[: len(rows_L) * len(weight)].view(len(rows_L), -1)
            torch.matmul(read_LC[:, : self._rank], weight.t(), out=made_LF)
            latent_plain(
                q_TND[:, heads],
                rotated_TNQ[:, heads],
                made_LF,
                read_LC[:, self._rank :],
                plan.prefill_chunks.query_start_P1,
                starts_P1,
                shape,
                out_TNV[:, heads],
                scale=kv.spec.scale,
            )
