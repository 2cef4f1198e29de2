"""The KV cache of ``sdpa``: its layout, the words that it is moved in, and memory that is taken as it is used.

Layout per layer: [2 K, blocks, B, D], the heads of the keys before those of the values. Gathering a sequence's blocks
for one head then gives its keys as one contiguous [L, D] matrix, which batched GEMMs read at full speed.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.layers.attention.base import LayerKV


@dataclass(frozen=True)
class PagedKV(LayerKV):
    """``k`` and ``v`` are the halves of one tensor. ``blocks`` [2 K * num_blocks, B * D] and ``cells`` [2 K *
    num_blocks * B, ...], rows of the widest words that divide a head, are the same memory."""

    blocks: Tensor
    cells: Tensor
    num_blocks: int

    @property
    def vectors(self) -> int:
        """How many a token leaves: its keys and values."""
        return len(self.blocks) // self.num_blocks

    @property
    def address(self) -> int:
        """What tells it from those of other layers."""
        return self.blocks.data_ptr()

    def values(self, gathered: Tensor) -> Tensor:
        """Those of ``gathered`` [keys, values; ...]."""
        return gathered[1]

    def gather(self, rows: Tensor) -> Tensor:
        """[R, B * D]: blocks, by their rows of ``blocks``, as numbers."""
        return self.blocks.index_select(0, rows)

    def empty(self, rows: Tensor) -> None:
        """Make these rows of ``blocks`` zero."""
        self.blocks.index_fill_(0, rows, 0)

    def write(self, cells: Tensor, new_TKD: Tensor, rows: Tensor | None) -> Tensor:
        """Write to ``cells`` the keys and values [T, 2 K, D] of these rows of T (``None``: of all); returns those of
        all as they are kept."""
        words = as_words(new_TKD)
        words = words.view(*new_TKD.shape[:2], words.shape[1])
        self.cells.index_copy_(0, cells, (words if rows is None else words[rows]).flatten(0, 1))
        return new_TKD

    def rows(self, block_ids: Tensor) -> Tensor:
        """The rows of ``blocks`` that hold these blocks of every head, head by head.

        They are selected along the first axis because torch spreads that over its threads, and no other.
        """
        first = torch.arange(0, len(self.blocks), self.num_blocks, device=block_ids.device)
        return (first.unsqueeze(1) + block_ids).flatten()


def as_words(x: Tensor) -> Tensor:
    """The rows (last axis) of a contiguous tensor as [rows, words] of up to 16 bytes: torch moves a row word by word,
    whatever they mean, and takes as long for a short one as for a long one."""
    row = x.shape[-1] * x.itemsize
    words = {16: torch.complex128, 8: torch.int64, 4: torch.int32}
    word = next((dtype for size, dtype in words.items() if row % size == 0), x.dtype)
    return x.view(-1, x.shape[-1]).view(word)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no time and, on a CPU, no memory until they are written: anonymous pages of the kernel's.

    The zeros matter: the block that is never written to is read, and a NaN there would survive being weighted with 0.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(
        mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype
    ).view(shape)
