"""What the GPU backends share: the cache layout [blocks, B, K, D], and a step split into decodes and prefill chunks.

A subclass gives two kernels: attention of one new token per sequence over its block table, and attention of several
new tokens over a cached prefix and, causally, over themselves. Keys and values are in the cache before either runs.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tpctl.layers.attention.base import AttentionBackend, LayerKV
from tpctl.layers.batch import ForwardBatch, PrefillChunks


class PagedBackend(AttentionBackend):
    """A backend whose kernels read the paged cache in place.

    Attributes:
        captures_prefill: whether steps with ``ForwardBatch.chunks`` can be run, and so captured in a graph.
    """

    captures_prefill = False

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        shape = (num_layers, 2, num_blocks, self.block_size, self.heads.num_kv_heads, self.heads.head_dim)
        caches = torch.zeros(shape, dtype=dtype, device=device)
        return [LayerKV(layer[0], layer[1]) for layer in caches]

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        for new_TKD, cache in ((k_TKD, kv.k), (v_TKD, kv.v)):
            cache.view(-1, *new_TKD.shape[1:]).index_copy_(0, batch.slot_mapping, new_TKD)

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch
    ) -> Tensor:
        return self.attend_cached(q_TND.contiguous(), kv, window, batch)

    def attend_cached(self, q_TND: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch) -> Tensor:
        """[T, N * D]: as ``attend``, when the new keys and values are already in the cache."""
        assert batch.seq_lens_S is not None
        decodes, out_TND = batch.num_decodes, torch.empty_like(q_TND)
        if batch.chunks is not None:
            self.decode_and_prefill(q_TND, kv, window, batch, batch.chunks, out_TND)
        elif decodes:
            tables, lens = batch.block_tables[:decodes], batch.seq_lens_S[:decodes]
            self.decode(q_TND[:decodes], kv, tables, lens, window, batch, out_TND[:decodes])
        if decodes < batch.num_tokens:
            self.prefill(q_TND[decodes:], kv, window, batch, out_TND[decodes:])
        return out_TND.view(batch.num_tokens, -1)

    def is_long(self, count: int, longest: int) -> bool:
        """Whether a step of ``count`` decodes, the longest of ``longest`` tokens, is planned as a long one.

        A captured graph holds one plan or the other; ``ForwardBatch.long_context`` says which.
        """
        return False

    def decode_and_prefill(
        self,
        q_TND: Tensor,
        kv: LayerKV,
        window: int | None,
        batch: ForwardBatch,
        chunks: PrefillChunks,
        out_TND: Tensor,
    ) -> None:
        """Decodes and prefill chunks of a captured step at once (``ForwardBatch.chunks``) into ``out_TND``."""
        raise NotImplementedError

    @abstractmethod
    def begin(self, batch: ForwardBatch, windows: set[int | None]) -> None:
        """Once a step, before the first layer: plan the decodes. Its device work may be captured in a graph."""

    @abstractmethod
    def decode(
        self,
        q_SND: Tensor,
        kv: LayerKV,
        tables_SM: Tensor,
        lens_S: Tensor,
        window: int | None,
        batch: ForwardBatch,
        out_SND: Tensor,
    ) -> None:
        """One new token per sequence into ``out_SND``. A length of 0 marks a row without work, its output unused."""

    @abstractmethod
    def prefill(self, q_TND: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch, out_TND: Tensor) -> None:
        """The new tokens of the sequences after the decodes into ``out_TND``."""


def prefill_chunks(batch: ForwardBatch) -> PrefillChunks:
    """The sequences after the decodes, query starts from 0; prepared once a step."""
    found: PrefillChunks | None = batch.scratch.get("prefill")
    if found is None:
        assert batch.seq_lens_S is not None
        assert batch.query_start_S1 is not None
        decodes = batch.num_decodes
        starts = batch.query_start_S1[decodes:] - decodes
        found = PrefillChunks(batch.block_tables[decodes:], starts, batch.seq_lens_S[decodes:])
        batch.scratch["prefill"] = found
    return found
