"""Attention by tpctl's own Triton kernels: complete, and in need of no extra wheel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tpctl.kernels.attention.packed_kv import pack_reference, row_bytes, unpack_blocks
from tpctl.kernels.attention.paged_decode import LONG_CONTEXT, DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.attention.paged_prefill import paged_prefill
from tpctl.kernels.common.launch import has_pdl
from tpctl.layers.attention.base import HeadShape, LayerKV
from tpctl.layers.attention.paged import PagedBackend, prefill_chunks
from tpctl.layers.batch import ForwardBatch, PrefillChunks

_MANY_ROWS = 512
"""Rows of prompts from which unpacking all they read beforehand costs less than in every program that reads it."""


class _Contexts(NamedTuple):
    """Where contexts are unpacked to: each sequence's first block, block tables, the longest one's tokens, memory."""

    starts: Tensor
    tables: Tensor
    longest: int
    out: tuple[Tensor, Tensor]


class TritonBackend(PagedBackend):
    name = "triton"
    default_block_size = 128
    captures_prefill = True

    def __init__(self, heads: HeadShape, block_size: int, packed: bool = False) -> None:
        """A backend for these heads.

        Args:
            packed: keep keys and values in 12 bits each (``kernels.packed_kv``), which takes bfloat16 and heads of
                ``HEAD_DIMS`` dimensions that are rotated whole.
        """
        super().__init__(heads, block_size)
        self.packed = packed
        self._unpacked: tuple[Tensor, Tensor] | None = None
        self._itemsize = 2
        self._scratch: DecodeScratch | None = None
        self._plans: dict[tuple[int, int | None, bool], DecodePlan] = {}
        self._side: torch.cuda.Stream | None = None

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        self._itemsize = dtype.itemsize
        if not self.packed:
            return super().allocate(num_layers, num_blocks, dtype, device)
        shape = (num_blocks, self.heads.num_kv_heads, self.block_size)
        rows = torch.zeros(num_layers, 2, *shape, row_bytes(self.heads.head_dim), dtype=torch.uint8, device=device)
        exponents = torch.zeros(num_layers, *shape, 2, dtype=torch.uint8, device=device)
        return [LayerKV(layer[0], layer[1], exponents=largest) for layer, largest in zip(rows, exponents, strict=True)]

    def keep_unpacked(self, tokens: int, step: int, device: torch.device) -> None:
        """Keep memory into which a packed cache's contexts of up to ``tokens`` together are unpacked before the prompts
        of a large step attend to them; beyond, and in captured steps, each program unpacks what it reads.

        step: new tokens of a step at most, which says how many contexts end with a block that they do not fill.
        """
        if self.packed:
            room = -(-tokens // self.block_size) + -(-step // self.block_size)
            shape = (room, self.block_size, self.heads.num_kv_heads, self.heads.head_dim)
            keys, values = torch.empty(2, *shape, dtype=torch.bfloat16, device=device)
            self._unpacked = keys, values

    def bytes_per_block(self, num_layers: int, dtype: torch.dtype) -> int:
        if not self.packed:
            return super().bytes_per_block(num_layers, dtype)
        vectors = 2 * num_layers * self.block_size * self.heads.num_kv_heads
        return vectors * (row_bytes(self.heads.head_dim) + 1)

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        if kv.exponents is None:
            super().store(k_TKD, v_TKD, kv, batch)
            return
        live = batch.slot_mapping >= 0
        slots = batch.slot_mapping[live]
        block, offset = slots // self.block_size, slots % self.block_size
        for index, (new_TKD, cache) in enumerate(((k_TKD, kv.k), (v_TKD, kv.v))):
            rows, largest = pack_reference(new_TKD[live].contiguous())
            cache[block, :, offset], kv.exponents[block, :, offset, index] = rows, largest

    def is_long(self, count: int, longest: int) -> bool:
        return count <= 2 and longest >= LONG_CONTEXT

    def begin(self, batch: ForwardBatch, windows: set[int | None]) -> None:
        count = batch.num_decodes
        if not count:
            return
        assert batch.seq_lens_S is not None
        for window in windows:
            plan = self._plan(count, window, batch.long_context, batch.seq_lens_S)
            plan.update(batch.seq_lens_S[:count])

    def _plan(self, count: int, window: int | None, long: bool, lens_S: Tensor) -> DecodePlan:
        """The plan for ``count`` decodes: kept, since captured graphs hold its buffers."""
        heads = self.heads
        if self._scratch is None or count * heads.num_heads > self._scratch.counters.numel():
            rows = max(512, count)
            self._scratch = DecodeScratch.allocate(rows, heads.num_heads, heads.head_dim, lens_S.device)
        plan = self._plans.get((count, window, long))
        if plan is None:
            plan = DecodePlan(
                count,
                heads.num_heads,
                heads.num_kv_heads,
                heads.head_dim,
                self.block_size,
                self._scratch,
                window=window,
                long=long,
                itemsize=self._itemsize,
                packed=self.packed,
            )
            self._plans[count, window, long] = plan
        return plan

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
        plan = self._plans[q_SND.shape[0], window, batch.long_context]
        pdl = has_pdl(q_SND.device)  # ignored by the kernel for batches that it would slow down
        paged_decode(
            q_SND,
            kv.k,
            kv.v,
            tables_SM,
            lens_S,
            plan,
            exponents=kv.exponents,
            scale=self.heads.scale,
            out=out_SND,
            pdl=pdl,
        )

    def decode_and_prefill(
        self,
        q_TND: Tensor,
        kv: LayerKV,
        window: int | None,
        batch: ForwardBatch,
        chunks: PrefillChunks,
        out_TND: Tensor,
    ) -> None:
        # A few dozen programs whose time is latency, on a stream of their own beside decodes that memory limits.
        assert batch.seq_lens_S is not None
        if self._side is None and q_TND.is_cuda:
            self._side = torch.cuda.Stream(q_TND.device)  # type: ignore[no-untyped-call]
        with _on_stream(self._side):
            self._prefill(q_TND, kv, window, chunks, out_TND)
        self.decode(q_TND, kv, batch.block_tables, batch.seq_lens_S, window, batch, out_TND)
        if self._side is not None:
            torch.cuda.current_stream(q_TND.device).wait_stream(self._side)

    def prefill(self, q_TND: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch, out_TND: Tensor) -> None:
        chunks = prefill_chunks(batch)
        if kv.exponents is not None and q_TND.shape[0] >= _MANY_ROWS and (found := self._contexts(batch, chunks)):
            starts, tables, longest, out = found
            unpack_blocks(kv.k, kv.v, kv.exponents, chunks.block_tables, chunks.seq_lens_P, starts, longest, out)
            kv, chunks = LayerKV(*out), chunks._replace(block_tables=tables)
        self._prefill(q_TND, kv, window, chunks, out_TND)

    def _contexts(self, batch: ForwardBatch, chunks: PrefillChunks) -> _Contexts | None:
        """Where what a step's prompts read is unpacked to; ``None`` if it is too much. Prepared once a step."""
        if "contexts" not in batch.scratch:
            lens = batch.seq_lens[batch.num_decodes :]
            counts = [-(-length // self.block_size) for length in lens]
            batch.scratch["contexts"] = None
            if self._unpacked is not None and sum(counts) <= self._unpacked[0].shape[0]:
                blocks_P = (chunks.seq_lens_P + (self.block_size - 1)) // self.block_size
                first = blocks_P.cumsum(0, dtype=torch.int32) - blocks_P
                tables = first[:, None] + torch.arange(max(counts), dtype=torch.int32, device=first.device)
                batch.scratch["contexts"] = _Contexts(first, tables, max(lens), self._unpacked)
        found: _Contexts | None = batch.scratch["contexts"]
        return found

    def _prefill(self, q_TND: Tensor, kv: LayerKV, window: int | None, chunks: PrefillChunks, out_TND: Tensor) -> None:
        paged_prefill(
            q_TND,
            kv.k,
            kv.v,
            *chunks,
            exponents=kv.exponents,
            scale=self.heads.scale,
            window=window,
            out=out_TND,
        )


@contextmanager
def _on_stream(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch on ``side``, behind what the current stream holds; ``None``: on the current one."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield
