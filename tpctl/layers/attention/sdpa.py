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
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.layers.attention.base import AttentionBackend, LayerKV
from tpctl.layers.batch import ForwardBatch

_MOST_SCORES = 1 << 17
"""Scores of one head and sequence, up to which two GEMMs and a softmax beat the fused kernel, which needs no scores."""


@dataclass(frozen=True)
class _Bucket:
    """Decodes of similar length, gathered and multiplied together.

    ``rows`` are their rows of the batch (``None``: all decodes, in order), ``blocks`` the ids of ``width`` blocks for
    each, flattened; ``lens_S`` counts the valid ones among the gathered keys.
    """

    rows: Tensor | None
    blocks: Tensor
    count: int
    width: int
    lens_S: Tensor


class SdpaBackend(AttentionBackend):
    name = "sdpa"
    default_block_size = 32

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        heads = self.heads
        shape = (num_layers, 2, heads.num_kv_heads, num_blocks, self.block_size, heads.head_dim)
        caches = _lazy_zeros(shape, dtype, device)
        return [LayerKV(layer[0], layer[1]) for layer in caches]

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        cells, rows = self._cells(kv, batch)
        for new_TKD, cache in ((k_TKD, kv.k), (v_TKD, kv.v)):
            new_KTD = (new_TKD if rows is None else new_TKD[rows]).transpose(0, 1)
            cache.view(-1, self.heads.head_dim).index_copy_(0, cells, new_KTD.reshape(-1, self.heads.head_dim))

    def _cells(self, kv: LayerKV, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """Where to write: rows of the cache as [K * slots, D], head by head; and the rows of T they come from
        (``None``: every row)."""
        found = batch.scratch.get("sdpa.cells")
        if found is None:
            kept = (batch.slot_mapping >= 0).nonzero().flatten()
            rows = kept if kept.numel() < batch.num_tokens else None
            slots = batch.slot_mapping if rows is None else batch.slot_mapping[rows]
            heads = torch.arange(self.heads.num_kv_heads, device=slots.device).unsqueeze(1)
            found = ((heads * (kv.k.shape[1] * self.block_size) + slots).flatten(), rows)
            batch.scratch["sdpa.cells"] = found
        cells, rows_or_none = found
        return cells, rows_or_none

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch
    ) -> Tensor:
        out_TND = torch.empty_like(q_TND)
        decodes = batch.num_decodes
        for bucket in self._buckets(batch):
            if bucket.rows is None:
                out_TND[:decodes] = self._decode(q_TND[:decodes], kv, window, bucket, batch)
            else:
                out_TND[bucket.rows] = self._decode(q_TND[bucket.rows], kv, window, bucket, batch)
        start, index = decodes, decodes
        lengths = list(zip(batch.query_lens, batch.seq_lens, strict=True))[decodes:]
        for (new, length), group in groupby(lengths):
            count = len(list(group))
            if new < length:  # a cached prefix: each sequence gathers its own blocks
                for one in range(index, index + count):
                    rows = slice(start, start + new)
                    keys, values = self._gather_prefix(kv, batch, one)
                    out_TND[rows] = self._prefill(q_TND[rows], keys, values, window, batch)
                    start += new
            else:
                rows = slice(start, start + count * new)
                shape = (count, new, self.heads.num_kv_heads, self.heads.head_dim)
                keys, values = (x[rows].view(shape).transpose(1, 2) for x in (k_TKD, v_TKD))
                out_TND[rows] = self._prefill(q_TND[rows], keys, values, window, batch)
                start = rows.stop
            index += count
        return out_TND.flatten(1)

    def _decode(self, q_SND: Tensor, kv: LayerKV, window: int | None, bucket: _Bucket, batch: ForwardBatch) -> Tensor:
        """One new token for each sequence of the bucket: two batched GEMMs over (head, sequence)."""
        heads, count = self.heads, bucket.count
        batched = heads.num_kv_heads * count
        keys = kv.k.index_select(1, bucket.blocks).view(batched, -1, heads.head_dim)
        values = kv.v.index_select(1, bucket.blocks).view(batched, -1, heads.head_dim)
        q_KSGD = q_SND.view(count, heads.num_kv_heads, heads.group, heads.head_dim).transpose(0, 1)
        q = q_KSGD.reshape(batched, heads.group, heads.head_dim)
        bias = self._decode_bias(bucket, window, q.dtype, batch)
        out = _weighted_values(q, keys, values, bias, heads.scale)
        out_KSGD = out.view(heads.num_kv_heads, count, heads.group, heads.head_dim)
        return out_KSGD.transpose(0, 1).reshape(count, heads.num_heads, heads.head_dim)

    def _decode_bias(self, bucket: _Bucket, window: int | None, dtype: torch.dtype, batch: ForwardBatch) -> Tensor:
        """[K * S, G, L] for the bucket's gathered keys: 0 for a sequence's own, -inf for others."""
        key = f"sdpa.decode.{id(bucket)}.{window}"
        found: Tensor | None = batch.scratch.get(key)
        if found is None:
            lens_S1 = bucket.lens_S.unsqueeze(1)
            positions_L = torch.arange(bucket.width * self.block_size, device=lens_S1.device)
            hidden_SL = positions_L >= lens_S1
            if window is not None:
                hidden_SL |= positions_L < lens_S1 - window
            bias_SL = torch.zeros(hidden_SL.shape, dtype=dtype, device=lens_S1.device)
            bias_SL.masked_fill_(hidden_SL, float("-inf"))
            found = bias_SL.unsqueeze(1).repeat(self.heads.num_kv_heads, self.heads.group, 1)
            batch.scratch[key] = found
        return found

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
                    width=width,
                    lens_S=torch.tensor([batch.seq_lens[row] for row in rows], device=device),
                )
            )
        batch.scratch["sdpa.buckets"] = found
        return found

    def _gather_prefix(self, kv: LayerKV, batch: ForwardBatch, index: int) -> tuple[Tensor, Tensor]:
        """All keys and values of one sequence, [1, K, L, D] each, the new ones included."""
        length = batch.seq_lens[index]
        blocks = batch.block_tables[index, : -(-length // self.block_size)].long()
        shape = (1, self.heads.num_kv_heads, -1, self.heads.head_dim)
        keys = kv.k.index_select(1, blocks).view(shape)[:, :, :length]
        values = kv.v.index_select(1, blocks).view(shape)[:, :, :length]
        return keys, values

    def _prefill(
        self, q_TND: Tensor, k_SKLD: Tensor, v_SKLD: Tensor, window: int | None, batch: ForwardBatch
    ) -> Tensor:
        """The last T / S of each sequence's L tokens, each over the keys up to its own."""
        heads, (count, _, length, _) = self.heads, k_SKLD.shape
        new = q_TND.shape[0] // count
        q = q_TND.view(count, new, heads.num_kv_heads, heads.group, heads.head_dim).permute(0, 2, 3, 1, 4)
        packed = q.reshape(count, heads.num_kv_heads, heads.group * new, heads.head_dim)
        bias = self._causal_bias(new, length, window, q_TND.dtype, q_TND.device, batch)
        if heads.group * new * length <= _MOST_SCORES:
            q, keys, values = (x.flatten(0, 1) for x in (packed, k_SKLD, v_SKLD))
            out = _weighted_values(q, keys, values, bias, heads.scale)
        else:
            out = F.scaled_dot_product_attention(packed, k_SKLD, v_SKLD, attn_mask=bias, scale=heads.scale)
        out_SNTD = out.reshape(count, heads.num_heads, new, heads.head_dim)
        return out_SNTD.transpose(1, 2).reshape(count * new, heads.num_heads, heads.head_dim)

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


def _weighted_values(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(q keys^T * scale + bias) values for batches of matrices.

    Args:
        q: [batch, rows, D]; keys, values: [batch, L, D]; bias: [batch or 1, rows, L] or [rows, L].
    """
    weights = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(weights, values)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no time and, on a CPU, no memory until they are written: anonymous pages of the kernel's.

    The zeros matter: keys beyond a sequence's end are read, and a NaN there would survive being weighted with 0.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
