"""``sdpa`` with keys and values in FP8 (``kernels.attention.fp8_vectors``): a block is made numbers as it is gathered.

A step's new keys and values are attended to as the cache keeps them, so that an answer does not depend on which of its
tokens were computed together, or found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.accounting import KvForm
from tpctl.kernels.attention.fp8_vectors import dequantise, quantise
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.attention.sdpa import SdpaBackend, SdpaPlan
from tpctl.layers.attention.sdpa_cache import PagedKV, Storage, lazy_zeros


@dataclass(frozen=True)
class Fp8KV(PagedKV):
    """``blocks`` and ``cells`` are bytes. ``scales``: bfloat16 [rows, B]. ``dtype``: of the numbers."""

    scales: Tensor
    dtype: torch.dtype

    def gather(self, rows: Tensor) -> Tensor:
        codes = super().gather(rows).view(len(rows), -1, self.spec.head_dim)
        return dequantise(codes, self.scales.index_select(0, rows), self.dtype).flatten(1)

    def empty(self, rows: Tensor) -> None:
        super().empty(rows)
        self.scales.index_fill_(0, rows, 0)

    def write(self, cells: Tensor, new_TKD: Tensor, rows: Tensor | None) -> Tensor:
        codes, scales_TK = quantise(new_TKD)
        super().write(cells, codes.view(torch.uint8), rows)
        written = scales_TK if rows is None else scales_TK[rows]
        self.scales.view(-1).index_copy_(0, cells, written.flatten())
        return dequantise(codes, scales_TK, self.dtype)


class SdpaFp8Backend(SdpaBackend):
    @property
    def kv_form(self) -> KvForm:
        return "fp8"

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def _layers(self, storages: Sequence[Storage], dtype: torch.dtype) -> list[PagedKV]:
        """Layers that share their codes' memory share that of their scales."""
        shared: dict[int, Tensor] = {}
        found: list[PagedKV] = []
        for spec, pool, at in zip(self.layers, self.pools.of_layer, storages, strict=True):
            rows = at.rows
            memory, before = rows.untyped_storage().data_ptr(), rows.storage_offset() // rows.stride(0)
            if memory not in shared:
                shared[memory] = lazy_zeros((before + len(rows), rows.shape[1]), torch.bfloat16, rows.device)
            own = shared[memory][before:]
            found.append(
                Fp8KV(spec, *at.sides, at.blocks, at.cells, at.first, at.empty_id, at.layer, own, dtype, pool=pool)
            )
        return found

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: SdpaPlan, sinks_N: Tensor | None = None
    ) -> Tensor:
        assert plan.new is not None
        keys, values = plan.new.chunk(2, dim=1)
        return super().attend(q_TND, keys, values, kv, plan, sinks_N)
