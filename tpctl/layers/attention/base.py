"""The interface of an attention backend.

A backend owns the layout of its KV cache. Each step it first stores the new keys and values, then attends: decodes
over their block tables, prefill chunks over their cached prefix and, causally, over themselves. Storing comes first
for all sequences of a step, so a sequence may read blocks that another one fills in the same step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpctl.layers.batch import ForwardBatch


@dataclass(frozen=True)
class HeadShape:
    """This rank's attention heads. ``scale`` multiplies the scores before the softmax."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values, in the layout of the backend that allocated them."""

    k: Tensor
    v: Tensor
    exponents: Tensor | None = field(default=None, kw_only=True)
    """Of a packed cache (``kernels.packed_kv``): uint8 [blocks, K, B, 2]; ``k`` and ``v`` are then its rows."""


class AttentionBackend(ABC):
    """Attention for one rank's heads."""

    name: str
    default_block_size: int

    def __init__(self, heads: HeadShape, block_size: int) -> None:
        self.heads = heads
        self.block_size = block_size

    @abstractmethod
    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        """Zeroed caches of ``num_blocks`` blocks for every layer."""

    def bytes_per_block(self, num_layers: int, dtype: torch.dtype) -> int:
        """Bytes that one block of ``allocate``'s caches takes over all layers, keys and values together."""
        return kv_bytes_per_block(self.heads, num_layers, self.block_size, dtype)

    @abstractmethod
    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        """Write the new keys and values to their slots; a slot of -1 is written nowhere."""

    @abstractmethod
    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch
    ) -> Tensor:
        """[T, N * D]: softmax(q k^T * scale) v for every new token over its sequence's keys so far.

        ``window`` limits a token to that many keys, its own included. ``k_TKD`` and ``v_TKD`` are what ``store`` was
        given.
        """


def kv_bytes_per_block(heads: HeadShape, num_layers: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values together, each value as it is."""
    return 2 * num_layers * block_size * heads.num_kv_heads * heads.head_dim * dtype.itemsize
