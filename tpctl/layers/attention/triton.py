"""Attention by tpctl's own Triton kernels: complete, and in need of no extra wheel."""

from __future__ import annotations

from torch import Tensor

from tpctl.kernels.paged_decode import LONG_CONTEXT, DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.paged_prefill import paged_prefill
from tpctl.layers.attention.base import HeadShape, LayerKV
from tpctl.layers.attention.paged import PagedBackend, prefill_lengths
from tpctl.layers.batch import ForwardBatch


class TritonBackend(PagedBackend):
    name = "triton"
    default_block_size = 128

    def __init__(self, heads: HeadShape, block_size: int) -> None:
        super().__init__(heads, block_size)
        self._scratch: DecodeScratch | None = None
        self._plans: dict[tuple[int, int | None, bool], DecodePlan] = {}

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
        # Ignored by the kernel for batches that it would slow down.
        paged_decode(q_SND, kv.k, kv.v, tables_SM, lens_S, plan, scale=self.heads.scale, out=out_SND, pdl=True)

    def prefill(self, q_TND: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch, out_TND: Tensor) -> None:
        tables, starts, lens = prefill_lengths(batch)
        paged_prefill(q_TND, kv.k, kv.v, tables, starts, lens, scale=self.heads.scale, window=window, out=out_TND)
