"""What the GPU backends share: the cache layout [blocks, B, K, D], and a step split into decodes and prefill chunks.

A subclass gives two kernels: attention of one new token per sequence over its block table, and attention of several
new tokens over a cached prefix and, causally, over themselves. Keys and values are in the cache before either runs:
one kernel norms and rotates heads and writes them there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpctl.accounting import KvLayout
from tpctl.layers.attention.base import AttentionBackend, AttentionPlan, AttentionSpec, LayerKV, Place, PlanT
from tpctl.layers.attention.heads import HeadPreparation, RanksSums
from tpctl.layers.batch import PrefillChunks

if TYPE_CHECKING:
    from tpctl.kernels.attention.rope_cache import NormedOverAll


@dataclass
class PagedPlan(AttentionPlan):
    """A step on a GPU."""

    @cached_property
    def prefill_chunks(self) -> PrefillChunks:
        """The sequences after the decodes, query starts from 0."""
        batch = self.batch
        assert batch.seq_lens_S is not None
        assert batch.query_start_S1 is not None
        decodes = batch.num_decodes
        starts = batch.query_start_S1[decodes:] - decodes
        tables = tuple(pool.block_tables[decodes:] for pool in batch.pools)
        lengths = zip(batch.query_lens[decodes:], batch.seq_lens[decodes:], strict=True)
        pairs = sum(new * (2 * length - new + 1) // 2 for new, length in lengths)
        return PrefillChunks(tables, starts, batch.seq_lens_S[decodes:], pairs)


class PagedBackend(AttentionBackend[PlanT]):
    """A backend whose kernels read the paged cache in place.

    Attributes:
        captures_prefill: whether steps with ``ForwardBatch.chunks`` can be run, and so captured in a graph.
    """

    captures_prefill = False
    _side: torch.cuda.Stream | None = None

    @property
    def shared_pool(self) -> int | None:
        """The pool whose blocks, where decodes all begin with the same, may be read once for all
        (``ForwardBatch.shared_1``)."""
        return None

    def prefix_bytes(self, count: int) -> int:
        """What steps of up to ``count`` decodes with such blocks take."""
        return 0

    def allocate(
        self, num_slabs: int, dtype: torch.dtype, device: torch.device, layout: KvLayout | None = None
    ) -> list[LayerKV]:
        shapes = [(self.block_size, spec.num_kv_heads, spec.head_dim) for spec in self.layers]
        caches = self.vectors(shapes, 2, num_slabs, dtype, device, layout)
        return [
            LayerKV(spec, *cache, pool=pool)
            for spec, cache, pool in zip(self.layers, caches, self.pools.of_layer, strict=True)
        ]

    def vectors(
        self,
        shapes: Sequence[tuple[int, ...]],
        count: int,
        num_slabs: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: KvLayout | None,
    ) -> list[list[Tensor]]:
        """For every layer ``count`` tensors [blocks, *its shape], zeroed.

        Where pools share memory, each of these is a view of what all layers share, from where the layer's part of the
        first block lies: a block's id says how many parts of its layer's size come before its own.
        """
        of_layer = self.pools.of_layer
        if layout is None or len(layout.windows) == 1:
            own = zeros([(count, num_slabs, *shape) for shape in shapes], dtype, device)
            return [list(one) for one in own]
        sizes = [math.prod(shape) for shape in shapes]
        most = max(
            of_layer.count(pool) * size * layout.per_slab[pool] for size, pool in zip(sizes, of_layer, strict=True)
        )
        unit = math.lcm(*sizes)
        slab = -(-most // unit) * unit
        shared = torch.zeros(count, num_slabs * slab, dtype=dtype, device=device)
        before, found = [0] * len(layout.windows), []  # layers of the pool so far
        places: dict[int, Place] = {}
        for shape, size, pool in zip(shapes, sizes, of_layer, strict=True):
            found.append([one.view(-1, *shape)[before[pool] :] for one in shared])
            before[pool] += 1
            places[pool] = Place(layout.per_slab[pool], slab // size, of_layer.count(pool))
        self.places = tuple(places[pool] for pool in range(len(layout.windows)))
        return found

    def run(
        self, qkv: Tensor, prepare: HeadPreparation, kv: LayerKV, plan: PlanT, sinks_N: Tensor | None = None
    ) -> Tensor:
        """As of ``AttentionBackend``; ``qkv`` may also be runs [S, T, ..] that add up to it."""
        from tpctl.kernels.attention.head_gates import head_gates
        from tpctl.kernels.attention.rope_cache import rope_cache
        from tpctl.kernels.common.launch import early_launch

        pdl = early_launch(plan.batch.num_tokens, qkv.device)
        q_TND = rope_cache(
            qkv,
            kv.k,
            kv.v,
            positions_T=plan.batch.rope_positions,
            slot_mapping_T=plan.batch.pools[kv.pool].slot_mapping,
            num_heads=kv.spec.num_heads,
            factors=kv.factors,
            over_all=None if prepare.over_all is None else _squares(qkv, kv.spec, prepare.over_all, pdl),
            pdl=pdl,
            **prepare.of_kernels,
        )
        found = self.attend_cached(q_TND, kv, plan, sinks_N)
        return head_gates(found, qkv, kv.spec.head_dim, pdl=pdl) if prepare.gated else found

    def run_again(self, q: Tensor, prepare: HeadPreparation, kv: LayerKV, plan: PlanT) -> Tensor:
        return self.run(q, prepare, kv, plan)

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: PlanT) -> None:
        for new_TKD, cache in ((k_TKD, kv.k), (v_TKD, kv.v)):
            cache.view(-1, *new_TKD.shape[1:]).index_copy_(0, plan.batch.pools[kv.pool].slot_mapping, new_TKD)

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: PlanT, sinks_N: Tensor | None = None
    ) -> Tensor:
        return self.attend_cached(q_TND.contiguous(), kv, plan, sinks_N)

    def attend_cached(self, q_TND: Tensor, kv: LayerKV, plan: PlanT, sinks_N: Tensor | None = None) -> Tensor:
        """[T, N * D]: as ``attend``, when the new keys and values are already in the cache."""
        batch = plan.batch
        assert batch.seq_lens_S is not None
        decodes, out_TND = batch.num_decodes, torch.empty_like(q_TND)
        if batch.chunks is not None:
            self.decode_and_prefill(q_TND, kv, plan, batch.chunks, out_TND, sinks_N)
        elif decodes:
            tables, lens = batch.pools[kv.pool].block_tables[:decodes], batch.seq_lens_S[:decodes]
            self.decode(q_TND[:decodes], kv, tables, lens, plan, out_TND[:decodes], sinks_N)
        if decodes < batch.num_tokens:
            self.prefill(q_TND[decodes:], kv, plan, out_TND[decodes:], sinks_N)
        return out_TND.view(batch.num_tokens, -1)

    def is_long(self, count: int, longest: int) -> bool:
        """Whether a step of ``count`` decodes, the longest of ``longest`` tokens, is planned as a long one.

        A captured graph holds one plan or the other; ``ForwardBatch.long_context`` says which.
        """
        return False

    def reserve(self, step: int, max_model_len: int, device: torch.device) -> None:
        """Once, before the memory for the cache is measured: take what steps of up to ``step`` tokens will need."""

    def share(self, other: PagedBackend[Any]) -> None:
        """In place of ``reserve``: use what ``other``, of which a pass runs before or behind one of this, has taken, as
        far as it serves."""

    def decode_and_prefill(
        self,
        q_TND: Tensor,
        kv: LayerKV,
        plan: PlanT,
        chunks: PrefillChunks,
        out_TND: Tensor,
        sinks_N: Tensor | None,
    ) -> None:
        """Decodes and prefill chunks of a captured step at once (``ForwardBatch.chunks``) into ``out_TND``."""
        # A few dozen programs whose time is latency, on a stream of their own beside decodes that memory limits.
        batch = plan.batch
        assert batch.seq_lens_S is not None
        if self._side is None and q_TND.is_cuda:
            self._side = torch.cuda.Stream(q_TND.device)  # type: ignore[no-untyped-call]
        with on_stream(self._side):
            self.prefill_pages(q_TND, kv, chunks, out_TND, sinks_N)
        self.decode(q_TND, kv, batch.pools[kv.pool].block_tables, batch.seq_lens_S, plan, out_TND, sinks_N)
        if self._side is not None:
            torch.cuda.current_stream(q_TND.device).wait_stream(self._side)

    def prefill_pages(
        self, q_TND: Tensor, kv: LayerKV, chunks: PrefillChunks, out_TND: Tensor, sinks_N: Tensor | None
    ) -> None:
        """Prefill chunks over the cache's pages into ``out_TND``, which a graph can hold: of those that
        ``captures_prefill``."""
        raise NotImplementedError

    @abstractmethod
    def decode(
        self,
        q_SND: Tensor,
        kv: LayerKV,
        tables_SM: Tensor,
        lens_S: Tensor,
        plan: PlanT,
        out_SND: Tensor,
        sinks_N: Tensor | None,
    ) -> None:
        """One new token per sequence into ``out_SND``. A length of 0 marks a row without work, its output unused."""

    @abstractmethod
    def prefill(self, q_TND: Tensor, kv: LayerKV, plan: PlanT, out_TND: Tensor, sinks_N: Tensor | None) -> None:
        """The new tokens of the sequences after the decodes into ``out_TND``."""


def zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of zeros that are one piece of memory, of which the allocator rounds up nothing but the whole."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = torch.split(torch.zeros(sum(sizes), dtype=dtype, device=device), sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _squares(qkv: Tensor, spec: AttentionSpec, over_all: RanksSums, pdl: bool) -> NormedOverAll:
    """What a norm over the heads of all ranks divides by (collective)."""
    from tpctl.kernels.attention.head_squares import head_squares
    from tpctl.kernels.attention.rope_cache import NormedOverAll

    own_T2 = head_squares(qkv, spec.num_heads, spec.num_kv_heads, counts_keys=over_all.counts_keys, pdl=pdl)
    return NormedOverAll(over_all.over_ranks(own_T2), over_all.q_size, over_all.k_size)


@contextmanager
def on_stream(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch on ``side``, behind what the current stream holds; ``None``: on the current one."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield
