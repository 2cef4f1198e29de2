"""The KV cache of ``sdpa``: its layout, the words that it is moved in, and memory that is taken as it is used.

Layout per layer: [2 K, blocks, B, D], the heads of the keys before those of the values; where pools share memory, the
2 K rows of a block lie together, [.., 2 K, B, D], and a block's id is that of its first. Gathering a sequence's blocks
for one head gives its keys as one contiguous [L, D] matrix either way, which batched GEMMs read at full speed.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.accounting import KeptLayer, KvLayout, LayerPools
from tpctl.layers.attention.base import LayerKV, Place


@dataclass(frozen=True)
class PagedKV(LayerKV):
    """``k`` and ``v`` are views of one tensor. ``blocks`` [rows, B * D] and ``cells`` [rows * B, ...], rows of the
    widest words that divide a head, are the same memory.

    Attributes:
        first: int64 [2 K], each vector's row in block 0; that in other blocks is as much further as their ids.
        empty_id: of the block that is never written to.
        layer: which it is, among those that share their memory.
    """

    blocks: Tensor
    cells: Tensor
    first: Tensor
    empty_id: int
    layer: int

    @property
    def vectors(self) -> int:
        """How many a token leaves: its keys and values."""
        return len(self.first)

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
        return (self.first.unsqueeze(1) + block_ids).flatten()


@dataclass(frozen=True)
class Storage:
    """Memory for the vectors of a layer, or of several.

    Attributes:
        rows: [rows, B, D], zero; where layers share memory, from the layer's own first row in block 0 on.
        first: as of ``PagedKV``.
        place: where the blocks of the layer's pool lie.
    """

    rows: Tensor
    first: Tensor
    place: Place
    empty_id: int
    layer: int

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Keys and values; where layers share memory, all of it each time."""
        if self.place != Place():
            return self.rows, self.rows
        both = self.rows.view(len(self.first), -1, *self.rows.shape[1:])
        keys, values = both.chunk(2)
        return keys, values

    @property
    def blocks(self) -> Tensor:
        return self.rows.flatten(1)

    @property
    def cells(self) -> Tensor:
        return as_words(self.rows)


def own_storage(
    layer: int, vectors: int, num_blocks: int, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Storage:
    """Memory for one layer's blocks, and one block more, which stays empty."""
    count = num_blocks + 1
    rows = lazy_zeros((vectors * count, block_size, dim), dtype, device)
    first = torch.arange(0, vectors * count, count, device=device)
    return Storage(rows, first, Place(), num_blocks, layer)


def shared_storage(
    kept: Sequence[KeptLayer],
    pools: LayerPools,
    layout: KvLayout,
    num_slabs: int,
    slab_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Storage]:
    """Memory of slabs for all layers, each of whose vectors is kept in ``dtype``, and one slab more, which stays empty.

    Args:
        slab_bytes: of these vectors; a multiple of what each layer keeps of a block.
    """
    memory = lazy_zeros(((num_slabs + 1) * slab_bytes // dtype.itemsize,), dtype, device)
    before, found = [0] * len(pools.windows), []  # rows that the pool's layers take of a block so far
    for layer, (one, pool) in enumerate(zip(kept, pools.of_layer, strict=True)):
        stride = slab_bytes // (layout.block_size * one.dim * dtype.itemsize)
        step = one.vectors * pools.of_layer.count(pool)
        place = Place(layout.per_slab[pool], stride, step)
        rows = memory.view(-1, layout.block_size, one.dim)[before[pool] :]
        first = torch.arange(one.vectors, device=device)
        found.append(Storage(rows, first, place, num_slabs * stride, layer))
        before[pool] += one.vectors
    return found


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
