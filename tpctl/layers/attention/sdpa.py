"""Attention in plain torch: the CPU's backend, and the reference on GPUs.

Cache layout per layer: [K, blocks, B, D]. Gathering a sequence's blocks for one head then gives its keys as one
contiguous [L, D] matrix, which batched GEMMs read at full speed.

The query heads of a group are packed: the G heads that read one KV head become G rows of one matrix, so that each
key is multiplied with all of them at once and never repeated.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.layers.attention.base import AttentionBackend, LayerKV
from tpctl.layers.batch import ForwardBatch


@dataclass(frozen=True)
class _Bucket:
    """Decodes of similar length, gathered and multiplied together.

    ``rows`` are their rows of the batch (``None``: all decodes, in order), ``blocks`` the ids of ``width`` blocks for
    each, flattened; ``positions_L`` numbers the gathered keys and ``lens_S`` counts the valid ones.
    """

    rows: Tensor | None
    blocks: Tensor
    count: int
    lens_S: Tensor
    positions_L: Tensor


class SdpaBackend(AttentionBackend):
    name = "sdpa"
    default_block_size = 32

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        heads = self.heads
        shape = (num_layers, 2, heads.num_kv_heads, num_blocks, self.block_size, heads.head_dim)
        caches = _lazy_zeros(shape, dtype, device)
        return [LayerKV(layer[0], layer[1]) for layer in caches]

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        slots, rows = self._slots(batch)
        for new_TKD, cache in ((k_TKD, kv.k), (v_TKD, kv.v)):
            new_KTD = (new_TKD if rows is None else new_TKD[rows]).transpose(0, 1)
            cache.view(self.heads.num_kv_heads, -1, self.heads.head_dim).index_copy_(1, slots, new_KTD)

    def _slots(self, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """The slots to write and the rows they come from (``None``: every row)."""
        found = batch.scratch.get("sdpa.slots")
        if found is None:
            rows = (batch.slot_mapping >= 0).nonzero().flatten()
            found = (batch.slot_mapping, None)
            if rows.numel() < batch.num_tokens:
                found = (batch.slot_mapping[rows], rows)
            batch.scratch["sdpa.slots"] = found
        slots, rows_or_none = found
        return slots, rows_or_none

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch
    ) -> Tensor:
        out_TND = torch.empty_like(q_TND)
        decodes = batch.num_decodes
        for bucket in self._buckets(batch):
            if bucket.rows is None:
                out_TND[:decodes] = self._decode(q_TND[:decodes], kv, window, bucket)
            else:
                out_TND[bucket.rows] = self._decode(q_TND[bucket.rows], kv, window, bucket)
        start = decodes
        for index in range(decodes, len(batch.seq_lens)):
            stop = start + batch.query_lens[index]
            new = slice(start, stop)
            if batch.seq_lens[index] == batch.query_lens[index]:
                keys, values = k_TKD[new].transpose(0, 1), v_TKD[new].transpose(0, 1)
            else:
                keys, values = self._gather_prefix(kv, batch, index)
            out_TND[new] = self._prefill(q_TND[new], keys, values, window, batch)
            start = stop
        return out_TND.flatten(1)

    def _decode(self, q_SND: Tensor, kv: LayerKV, window: int | None, bucket: _Bucket) -> Tensor:
        """One new token for each sequence of the bucket: two batched GEMMs over (head, sequence)."""
        heads, count = self.heads, bucket.count
        batched = heads.num_kv_heads * count
        keys = kv.k.index_select(1, bucket.blocks).view(batched, -1, heads.head_dim)
        values = kv.v.index_select(1, bucket.blocks).view(batched, -1, heads.head_dim)
        q_KSGD = q_SND.view(count, heads.num_kv_heads, heads.group, heads.head_dim).transpose(0, 1)
        q = q_KSGD.mul(heads.scale).reshape(batched, heads.group, heads.head_dim)
        scores = torch.bmm(q, keys.transpose(1, 2)).view(heads.num_kv_heads, count, heads.group, -1)
        hidden_SL = bucket.positions_L >= bucket.lens_S.unsqueeze(1)
        if window is not None:
            hidden_SL = hidden_SL | (bucket.positions_L < (bucket.lens_S - window).unsqueeze(1))
        scores.masked_fill_(hidden_SL.unsqueeze(1), float("-inf"))
        weights = scores.softmax(-1).view(batched, heads.group, -1)
        out_KSGD = torch.bmm(weights, values).view(heads.num_kv_heads, count, heads.group, heads.head_dim)
        return out_KSGD.transpose(0, 1).reshape(count, heads.num_heads, heads.head_dim)

    def _buckets(self, batch: ForwardBatch) -> list[_Bucket]:
        """Group the decodes so that none gathers more than about twice the blocks it has."""
        found: list[_Bucket] | None = batch.scratch.get("sdpa.buckets")
        if found is not None:
            return found
        members: dict[int, list[int]] = {}
        for row in range(batch.num_decodes):
            blocks = -(-batch.seq_lens[row] // self.block_size)
            members.setdefault(blocks.bit_length(), []).append(row)
        device = batch.block_tables.device
        found = []
        for rows in members.values():
            width = max(-(-batch.seq_lens[row] // self.block_size) for row in rows)
            index = torch.tensor(rows, device=device)
            found.append(
                _Bucket(
                    rows=None if len(members) == 1 else index,
                    blocks=batch.block_tables[index, :width].flatten().long(),
                    count=len(rows),
                    lens_S=torch.tensor([batch.seq_lens[row] for row in rows], device=device),
                    positions_L=torch.arange(width * self.block_size, device=device),
                )
            )
        batch.scratch["sdpa.buckets"] = found
        return found

    def _gather_prefix(self, kv: LayerKV, batch: ForwardBatch, index: int) -> tuple[Tensor, Tensor]:
        """All keys and values of one sequence, [K, L, D] each, the new ones included."""
        length = batch.seq_lens[index]
        blocks = batch.block_tables[index, : -(-length // self.block_size)].long()
        shape = (self.heads.num_kv_heads, -1, self.heads.head_dim)
        keys = kv.k.index_select(1, blocks).view(shape)[:, :length]
        values = kv.v.index_select(1, blocks).view(shape)[:, :length]
        return keys, values

    def _prefill(self, q_TND: Tensor, k_KLD: Tensor, v_KLD: Tensor, window: int | None, batch: ForwardBatch) -> Tensor:
        """The last T of a sequence's L tokens, each over the keys up to its own."""
        heads, new = self.heads, q_TND.shape[0]
        q_KGTD = q_TND.view(new, heads.num_kv_heads, heads.group, heads.head_dim).permute(1, 2, 0, 3)
        packed = q_KGTD.reshape(1, heads.num_kv_heads, heads.group * new, heads.head_dim)
        bias = self._causal_bias(new, k_KLD.shape[1], window, q_TND.dtype, q_TND.device, batch)
        out = F.scaled_dot_product_attention(
            packed, k_KLD.unsqueeze(0), v_KLD.unsqueeze(0), attn_mask=bias, scale=heads.scale
        )
        return out.reshape(heads.num_heads, new, heads.head_dim).transpose(0, 1)

    def _causal_bias(
        self, new: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device, batch: ForwardBatch
    ) -> Tensor:
        """[G * new, length]: 0 where a new token may look, -inf elsewhere; the same for each head of a group."""
        key = f"sdpa.bias.{new}.{length}.{window}"
        found: Tensor | None = batch.scratch.get(key)
        if found is None:
            query = torch.arange(length - new, length, device=device).unsqueeze(1)
            keys = torch.arange(length, device=device)
            hidden = keys > query
            if window is not None:
                hidden |= keys <= query - window
            found = torch.zeros(new, length, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            found = found.repeat(self.heads.group, 1)
            batch.scratch[key] = found
        return found


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no time and, on a CPU, no memory until they are written: anonymous pages of the kernel's.

    The zeros matter: keys beyond a sequence's end are read, and a NaN there would survive being weighted with 0.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
