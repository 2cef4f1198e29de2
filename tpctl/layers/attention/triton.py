"""Attention by tpctl's own Triton kernels: complete, and in need of no extra wheel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpctl.accounting import KvForm, KvLayout, LayerPools, prefix_bytes, prefix_rows, unpacked_tokens
from tpctl.kernels.attention.fp8_vectors import quantise
from tpctl.kernels.attention.packed_kv import pack_reference, row_bytes, unpack_blocks
from tpctl.kernels.attention.paged_decode import LONG_CONTEXT, DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.attention.paged_prefill import paged_prefill
from tpctl.kernels.attention.shared_prefix import SharedPrefix
from tpctl.kernels.common.launch import has_pdl
from tpctl.layers.attention.base import AttentionSpec, LayerKV
from tpctl.layers.attention.paged import PagedBackend, PagedPlan
from tpctl.layers.batch import ForwardBatch, PrefillChunks

_MANY_ROWS = 512
"""Rows of prompts from which unpacking all they read beforehand costs less than in every program that reads it."""


class _Contexts(NamedTuple):
    """Where a step's contexts are unpacked to: each sequence's first block, block tables, the longest one's tokens."""

    starts: Tensor
    tables: Tensor
    longest: int


@dataclass
class TritonPlan(PagedPlan):
    """A step. ``decodes`` has a plan for each sort of layer."""

    decodes: dict[AttentionSpec, DecodePlan]
    block_size: int
    room: int
    """Blocks that contexts can be unpacked to."""

    @cached_property
    def contexts(self) -> _Contexts | None:
        """Where what the step's prompts read is unpacked to; ``None`` if it is too much."""
        lens_P = self.prefill_chunks.seq_lens_P
        lens = self.batch.seq_lens[self.batch.num_decodes :]
        counts = [-(-length // self.block_size) for length in lens]
        if sum(counts) > self.room:
            return None
        blocks_P = (lens_P + (self.block_size - 1)) // self.block_size
        first = blocks_P.cumsum(0, dtype=torch.int32) - blocks_P
        tables = first[:, None] + torch.arange(max(counts), dtype=torch.int32, device=first.device)
        return _Contexts(first, tables, max(lens))


class TritonBackend(PagedBackend[TritonPlan]):
    name = "triton"
    captures_prefill = True

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        block_size: int,
        kv_form: KvForm = "model",
        pools: LayerPools | None = None,
    ) -> None:
        """A backend for these layers.

        Args:
            kv_form: how to keep keys and values. ``"packed"`` takes bfloat16 and heads of ``PACKED_HEAD_DIMS``
                dimensions that are rotated whole; ``"fp8"`` bfloat16 or float16, and heads of as many dimensions.
        """
        super().__init__(layers, block_size, pools)
        self._kv_form = kv_form
        self._sorts = tuple(dict.fromkeys(self.layers))
        self._unpacked: tuple[Tensor, Tensor] | None = None  # of the widest layer, bfloat16 [blocks, B * K * D]
        self._itemsize = 2
        self._scratch: DecodeScratch | None = None
        self._plans: dict[tuple[int, AttentionSpec, bool, bool], DecodePlan] = {}
        self._prefixes: list[tuple[Tensor, Tensor]] = []  # captured graphs go on to write to older ones

    @property
    def kv_form(self) -> KvForm:
        return self._kv_form

    def allocate(
        self, num_slabs: int, dtype: torch.dtype, device: torch.device, layout: KvLayout | None = None
    ) -> list[LayerKV]:
        self._itemsize = dtype.itemsize
        if self.kv_form == "model":
            return super().allocate(num_slabs, dtype, device, layout)
        fp8 = self.kv_form == "fp8"
        rows = [(spec.num_kv_heads, self.block_size) for spec in self.layers]
        widths = [spec.head_dim if fp8 else row_bytes(spec.head_dim) for spec in self.layers]
        shapes = [(*row, width) for row, width in zip(rows, widths, strict=True)]
        caches = self.vectors(shapes, 2, num_slabs, torch.uint8, device, layout)
        kind = torch.bfloat16 if fp8 else torch.uint8
        factors = self.vectors([(*row, 2) for row in rows], 1, num_slabs, kind, device, layout)
        return [
            LayerKV(spec, *cache, factors=pairs, pool=pool)
            for spec, cache, (pairs,), pool in zip(self.layers, caches, factors, self.pools.of_layer, strict=True)
        ]

    def reserve(self, step: int, max_model_len: int, device: torch.device) -> None:
        """Keep memory into which the contexts of a packed or an FP8 cache are unpacked before the prompts of a large
        step attend to them; beyond, and in captured steps, each program unpacks what it reads."""
        if self.kv_form != "model":
            tokens = unpacked_tokens(step, max_model_len)
            room = -(-tokens // self.block_size) + -(-step // self.block_size)  # some do not fill their last block
            widest = self.block_size * max(spec.num_kv_heads * spec.head_dim for spec in self.layers)
            keys, values = torch.empty(2, room, widest, dtype=torch.bfloat16, device=device)
            self._unpacked = keys, values

    def share(self, other: PagedBackend[Any]) -> None:
        if isinstance(other, TritonBackend) and set(self.layers) <= set(other.layers):
            self._unpacked = other._unpacked

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: TritonPlan) -> None:
        if kv.factors is None:
            super().store(k_TKD, v_TKD, kv, plan)
            return
        slot_mapping = plan.batch.pools[kv.pool].slot_mapping
        live = slot_mapping >= 0
        slots = slot_mapping[live]
        block, offset = slots // self.block_size, slots % self.block_size
        for index, (new_TKD, cache) in enumerate(((k_TKD, kv.k), (v_TKD, kv.v))):
            new = new_TKD[live].contiguous()
            if self.kv_form == "fp8":
                codes, factors = quantise(new)
                rows = codes.view(torch.uint8)
            else:
                rows, factors = pack_reference(new)
            cache[block, :, offset], kv.factors[block, :, offset, index] = rows, factors

    def is_long(self, count: int, longest: int) -> bool:
        return count <= 2 and longest >= LONG_CONTEXT

    def begin(self, batch: ForwardBatch) -> TritonPlan:
        room = 0 if self._unpacked is None else self._unpacked[0].shape[0]
        plan = TritonPlan(batch, {}, self.block_size, room)
        if batch.num_decodes:
            assert batch.seq_lens_S is not None
            for spec in self._sorts:
                shared = batch.shared_1 is not None and _reads_all(spec)
                plan.decodes[spec] = self._plan(batch.num_decodes, spec, batch.long_context, shared, batch.seq_lens_S)
            for decodes in {id(one): one for one in plan.decodes.values()}.values():
                decodes.update(batch.seq_lens_S[: batch.num_decodes], batch.shared_1)
        return plan

    @property
    def shared_pool(self) -> int | None:
        return self.pools.windows.index(None) if any(map(_reads_all, self.layers)) else None

    def _prefix(self, count: int, spec: AttentionSpec, device: torch.device) -> SharedPrefix:
        """Memory for what ``count`` decodes find in a prefix that they share."""
        rows = count * spec.num_heads
        if not self._prefixes or self._prefixes[-1][1].shape[0] < rows:
            most, widest = self._prefix_sizes(count)
            sizes = (most * widest,), (most, 2)
            sums, stats = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
            self._prefixes.append((sums, stats))
        sums, stats = self._prefixes[-1]
        return SharedPrefix(
            torch.zeros(1, dtype=torch.int32, device=device),
            sums[: rows * spec.head_dim].view(count, -1, spec.head_dim),
            stats[:rows],
        )

    def _prefix_sizes(self, count: int) -> tuple[int, int]:
        """Rows, and numbers of each, of what so many decodes find."""
        heads, widest = max(one.num_heads for one in self.layers), max(one.head_dim for one in self.layers)
        return prefix_rows(count, heads), widest

    def prefix_bytes(self, count: int) -> int:
        heads, widest = max(one.num_heads for one in self.layers), max(one.head_dim for one in self.layers)
        return 0 if self.shared_pool is None else prefix_bytes(count, heads, widest)

    def _plan(self, count: int, spec: AttentionSpec, long: bool, shared: bool, like: Tensor) -> DecodePlan:
        """The plan for ``count`` decodes, on ``like``'s device: kept, since captured graphs hold its buffers."""
        most = max(spec.num_heads for spec in self.layers)
        if self._scratch is None or count * most > self._scratch.counters.numel():
            widest = max(spec.head_dim for spec in self.layers)
            self._scratch = DecodeScratch.allocate(max(512, count), most, widest, like.device)
        plan = self._plans.get((count, spec, long, shared))
        if plan is None:
            plan = DecodePlan(
                count,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                self.block_size,
                self._scratch,
                window=spec.window,
                softcap=spec.softcap,
                long=long,
                itemsize=self._itemsize,
                packed=self.kv_form != "model",
                prefix=self._prefix(count, spec, like.device) if shared else None,
            )
            self._plans[count, spec, long, shared] = plan
        return plan

    def decode(
        self,
        q_SND: Tensor,
        kv: LayerKV,
        tables_SM: Tensor,
        lens_S: Tensor,
        plan: TritonPlan,
        out_SND: Tensor,
        sinks_N: Tensor | None,
    ) -> None:
        pdl = has_pdl(q_SND.device)  # ignored by the kernel for batches that it would slow down
        paged_decode(
            q_SND,
            kv.k,
            kv.v,
            tables_SM,
            lens_S,
            plan.decodes[kv.spec],
            factors=kv.factors,
            scale=kv.spec.scale,
            sinks_N=sinks_N,
            out=out_SND,
            pdl=pdl,
        )

    def prefill(self, q_TND: Tensor, kv: LayerKV, plan: TritonPlan, out_TND: Tensor, sinks_N: Tensor | None) -> None:
        chunks = plan.prefill_chunks
        if kv.factors is not None and q_TND.shape[0] >= _MANY_ROWS and (found := plan.contexts):
            out = self._unpacked_for(kv.spec)
            unpack_blocks(
                kv.k,
                kv.v,
                kv.factors,
                chunks.block_tables[kv.pool],
                chunks.seq_lens_P,
                found.starts,
                found.longest,
                out,
                query_start=chunks.query_start_P1,
                window=kv.spec.window,
            )
            kv, chunks = LayerKV(kv.spec, *out), chunks._replace(block_tables=(found.tables,))
        self.prefill_pages(q_TND, kv, chunks, out_TND, sinks_N)

    def _unpacked_for(self, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Memory for the unpacked contexts of one layer: keys and values, [blocks, B, K, D] each."""
        assert self._unpacked is not None
        shape = (-1, self.block_size, spec.num_kv_heads, spec.head_dim)
        width = self.block_size * spec.num_kv_heads * spec.head_dim
        keys, values = (half.view(-1)[: len(half) * width].view(shape) for half in self._unpacked)
        return keys, values

    def prefill_pages(
        self, q_TND: Tensor, kv: LayerKV, chunks: PrefillChunks, out_TND: Tensor, sinks_N: Tensor | None
    ) -> None:
        paged_prefill(
            q_TND,
            kv.k,
            kv.v,
            chunks.block_tables[kv.pool],
            chunks.query_start_P1,
            chunks.seq_lens_P,
            factors=kv.factors,
            scale=kv.spec.scale,
            window=kv.spec.window,
            softcap=kv.spec.softcap,
            sinks_N=sinks_N,
            pairs=chunks.pairs,
            out=out_TND,
        )


def _reads_all(spec: AttentionSpec) -> bool:
    """Whether a layer attends to all that was before, and to nothing else."""
    return spec.window is None and not spec.sinks
