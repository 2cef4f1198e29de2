"""Attention by the flash-attn packages: FlashAttention-2's paged functions, or FlashAttention-3's where installed.

Dao, "FlashAttention-2" (2023); Shah et al., "FlashAttention-3" (2024). FlashAttention-2 wants KV blocks of a multiple
of 256 tokens; FlashAttention-3 of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from inspect import signature
from typing import Any

from torch import Tensor

from tpctl.accounting import LayerPools
from tpctl.errors import EngineError
from tpctl.layers.attention.base import AttentionSpec, LayerKV
from tpctl.layers.attention.paged import PagedBackend, PagedPlan
from tpctl.layers.batch import ForwardBatch


@cache
def installed_flash_attention() -> str | None:
    """``"fa3"``, ``"fa2"`` or ``None``. flash-attn-4 has a ``flash_attn`` package too, but not FA2's extension."""
    if find_spec("flash_attn_interface") is not None:
        return "fa3"
    return "fa2" if find_spec("flash_attn_2_cuda") is not None else None


@dataclass
class FlashPlan(PagedPlan):
    """A step."""

    @cached_property
    def key_ends(self) -> Tensor:
        """int32 [P + 1]: where the keys of each prefill chunk begin, counted together, and where the last end."""
        return _running_sum(self.prefill_chunks.seq_lens_P)


class FlashAttentionBackend(PagedBackend[FlashPlan]):
    name = "flash-attn"

    def __init__(self, layers: Sequence[AttentionSpec], block_size: int, pools: LayerPools | None = None) -> None:
        super().__init__(layers, block_size, pools)
        self.version = installed_flash_attention()
        multiple = 16 if self.version == "fa3" else 256
        if block_size % multiple:
            raise EngineError(
                f"--block-size {block_size} is no multiple of {multiple}, which flash-attn needs; "
                f"use {multiple} or --attention-backend triton"
            )
        self._varlen, self._cached = _functions(self.version)
        if any(_cap(spec) for spec in layers) and "softcap" not in signature(self._cached).parameters:
            raise EngineError(
                "the installed flash-attn caps no attention scores, as this model does; install flash-attn 2.6 or "
                "later, or use --attention-backend triton"
            )

    def begin(self, batch: ForwardBatch) -> FlashPlan:
        """The package divides the work by shapes alone."""
        return FlashPlan(batch)

    def decode(
        self,
        q_SND: Tensor,
        kv: LayerKV,
        tables_SM: Tensor,
        lens_S: Tensor,
        plan: FlashPlan,
        out_SND: Tensor,
        sinks_N: Tensor | None,
    ) -> None:
        assert sinks_N is None, "select refuses flash-attn for them"
        tables = {"page_table" if self.version == "fa3" else "block_table": tables_SM}
        # FA3 chooses its number of splits on the host unless it is fixed, and then cannot be captured.
        splits = {"num_splits": _fixed_splits(q_SND.shape[0])} if self.version == "fa3" else {}
        out = self._cached(
            q_SND.unsqueeze(1),
            kv.k,
            kv.v,
            cache_seqlens=lens_S,
            softmax_scale=kv.spec.scale,
            causal=True,
            window_size=_window(kv.spec.window),
            **_cap(kv.spec),
            **tables,
            **splits,
        )
        out_SND.copy_(out.squeeze(1))

    def prefill(self, q_TND: Tensor, kv: LayerKV, plan: FlashPlan, out_TND: Tensor, sinks_N: Tensor | None) -> None:
        assert sinks_N is None, "select refuses flash-attn for them"
        (tables,), starts, lens, _ = plan.prefill_chunks
        batch = plan.batch
        decodes = batch.num_decodes
        longest_query, longest = max(batch.query_lens[decodes:]), max(batch.seq_lens[decodes:])
        if self.version == "fa3":
            out = self._cached(
                q_TND,
                kv.k,
                kv.v,
                cache_seqlens=lens,
                page_table=tables,
                cu_seqlens_q=starts,
                max_seqlen_q=longest_query,
                softmax_scale=kv.spec.scale,
                causal=True,
                window_size=_window(kv.spec.window),
                **_cap(kv.spec),
            )
        else:
            out = self._varlen(
                q_TND,
                kv.k,
                kv.v,
                starts,
                plan.key_ends,
                longest_query,
                longest,
                softmax_scale=kv.spec.scale,
                causal=True,
                window_size=_window(kv.spec.window),
                block_table=tables,
                **_cap(kv.spec),
            )
        out_TND.copy_(out)


def _functions(version: str | None) -> tuple[Any, Any]:
    """(varlen function, cached function) of the installed package."""
    if version == "fa3":
        import flash_attn_interface

        return flash_attn_interface.flash_attn_varlen_func, flash_attn_interface.flash_attn_with_kvcache
    if version == "fa2":
        import flash_attn

        return flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache
    raise EngineError(
        "flash-attn is not installed; install it (pip install flash-attn) or use --attention-backend triton"
    )


def _window(window: int | None) -> tuple[int, int]:
    """The packages count the keys to the left of a token, itself not included; -1 is unlimited."""
    return (-1, -1) if window is None else (window - 1, 0)


def _cap(spec: AttentionSpec) -> dict[str, float]:
    """The argument of a layer that caps its scores, which versions before 2.6 do not have."""
    return {} if spec.softcap is None else {"softcap": spec.softcap}


def _fixed_splits(num_seqs: int) -> int:
    """Enough splits to fill the device for small batches."""
    return max(1, min(32, 64 // num_seqs))


def _running_sum(lens_S: Tensor) -> Tensor:
    """int32 [S + 1]: 0, then the sums of the first lengths."""
    ends = lens_S.new_zeros(lens_S.shape[0] + 1)
    ends[1:] = lens_S.cumsum(0)
    return ends
