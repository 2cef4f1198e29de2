"""Attention in plain torch: the CPU's backend, and the reference on GPUs.

The cache (``sdpa_cache``) is gathered block by block into matrices that batched GEMMs read at full speed.

A decode multiplies with everything in its sequence's last block, and with as many blocks as the longest sequence has;
what is not its own gets the weight 0. A NaN would survive that: a block is emptied when its first token comes, and for
blocks that a sequence does not have one is gathered that nothing is ever written to.

The query heads of a group are packed: the G heads that read one KV head become G rows of one matrix, so that each
key is multiplied with all of them at once and never repeated.

While the same sequences decode, what was gathered is kept, and each step adds its new keys and values to it: gathering
is the dearest part of a step after the linears.

Prefill goes block by block of queries. A block multiplies with no key behind its last query or before its first
query's window, and its scores are the largest thing in memory, however long the context is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.layers.attention.base import AttentionBackend, HeadShape, LayerKV, kv_bytes_per_block
from tpctl.layers.attention.sdpa_cache import PagedKV, as_words, lazy_zeros
from tpctl.layers.batch import ForwardBatch

_QUERY_BLOCK = 64
"""Queries of a sequence that are multiplied at once: of 32 to 256 the fastest for 128 to 2,048 keys, by a little."""
_LEAST_QUERY_BLOCK = 16
_MOST_SCORES = 1 << 23
"""Scores in memory at once, above which fewer sequences, then fewer queries, are taken together."""


_MOST_KEPT = 1 << 29
"""Bytes of gathered keys and values that are kept from step to step, in all layers together; of a small cache less."""


@dataclass
class _Kept:
    """Gathered keys and values that the next step may continue: of ``lens`` tokens in the blocks ``tables_SW``.

    ``tables_SW`` is -1 behind a sequence's own blocks. ``layers`` holds [2, K * S, L, D] for each layer, by its cache's
    address; there is room for L tokens.
    """

    lens: list[int]
    tables_SW: Tensor
    layers: dict[int, Tensor]

    @property
    def room(self) -> int:
        """L."""
        return next(iter(self.layers.values())).shape[2]

    def is_followed_by(self, lens: list[int], tables_SW: Tensor) -> bool:
        """Whether the next step's decodes are the same sequences, each with one token more, for which there is room.

        Equal block tables are enough to tell: a sequence that is new has been a prompt in between, or found all of its
        blocks, and so their contents, in the prefix cache.
        """
        grown = all(new == old + 1 for new, old in zip(lens, self.lens, strict=True))
        if not (grown and self.layers) or max(lens) > self.room:
            return False
        new_SW = tables_SW[:, : self.tables_SW.shape[1]]
        return bool(((self.tables_SW == new_SW) | (self.tables_SW < 0)).all())


@dataclass(frozen=True)
class _Bucket:
    """Decodes of similar length, gathered and multiplied together.

    ``rows`` are their rows of the batch (``None``: all decodes, in order), ``cache_rows`` the rows of
    ``PagedKV.blocks`` that hold ``width`` blocks for each; ``lens_S`` counts the valid ones among the gathered keys.
    ``cells``, where ``kept`` goes on with the step before: where its words for the new tokens go, token by token.
    """

    rows: Tensor | None
    cache_rows: Tensor
    count: int
    width: int
    lens_S: Tensor
    kept: _Kept | None = None
    cells: Tensor | None = None


class SdpaBackend(AttentionBackend):
    name = "sdpa"
    default_block_size = 32

    def __init__(self, heads: HeadShape, block_size: int) -> None:
        super().__init__(heads, block_size)
        self._kept: dict[tuple[int, ...], _Kept] = {}  # by the rows of a bucket
        self._most_kept = 0  # tokens

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        heads = self.heads
        token = kv_bytes_per_block(heads, num_layers, 1, dtype)
        self._most_kept = min(_MOST_KEPT // token, num_blocks * self.block_size // 4)
        num_blocks += 1  # the last one stays empty
        caches = lazy_zeros(
            (num_layers, 2 * heads.num_kv_heads, num_blocks, self.block_size, heads.head_dim), dtype, device
        )
        half = heads.num_kv_heads
        return [
            PagedKV(both[:half], both[half:], both.view(2 * half * num_blocks, -1), as_words(both), num_blocks)
            for both in caches
        ]

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        assert isinstance(kv, PagedKV)
        begun = self._begun(kv, batch)
        if begun is not None:
            kv.blocks.index_fill_(0, begun, 0)
        cells, rows = self._cells(kv, batch)
        words = as_words(torch.cat((k_TKD, v_TKD), dim=1))
        words = words.view(batch.num_tokens, 2 * self.heads.num_kv_heads, words.shape[1])
        batch.scratch["sdpa.words"] = words  # of this layer, for ``_decode``
        kv.cells.index_copy_(0, cells, (words if rows is None else words[rows]).flatten(0, 1))

    def _begun(self, kv: PagedKV, batch: ForwardBatch) -> Tensor | None:
        """Rows of ``kv.blocks``: the blocks whose first tokens are among the new ones, and that these do not fill."""
        if "sdpa.begun" not in batch.scratch:
            batch.scratch["sdpa.begun"] = None
            found = []
            for sequence, (new, length) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
                filled = length % self.block_size
                if 0 < filled <= new:
                    found.append((sequence, length // self.block_size))
            if found:
                sequences, blocks = torch.tensor(found, device=batch.block_tables.device).unbind(1)
                batch.scratch["sdpa.begun"] = kv.rows(batch.block_tables[sequences, blocks])
        begun: Tensor | None = batch.scratch["sdpa.begun"]
        return begun

    def _cells(self, kv: PagedKV, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """Where to write: rows of ``kv.cells``, all heads of a token together; and the rows of T they come from
        (``None``: every row)."""
        found = batch.scratch.get("sdpa.cells")
        if found is None:
            kept = (batch.slot_mapping >= 0).nonzero().flatten()
            rows = kept if kept.numel() < batch.num_tokens else None
            slots = batch.slot_mapping if rows is None else batch.slot_mapping[rows]
            first = torch.arange(0, len(kv.cells), kv.num_blocks * self.block_size, device=slots.device)
            found = ((slots.unsqueeze(1) + first).flatten(), rows)
            batch.scratch["sdpa.cells"] = found
        cells, rows_or_none = found
        return cells, rows_or_none

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, window: int | None, batch: ForwardBatch
    ) -> Tensor:
        assert isinstance(kv, PagedKV)
        decodes, buckets = batch.num_decodes, self._buckets(kv, batch)
        if decodes == batch.num_tokens and len(buckets) == 1:
            return self._decode(q_TND, kv, window, buckets[0], batch).flatten(1)
        out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        for bucket in buckets:
            rows = slice(decodes) if bucket.rows is None else bucket.rows
            out_TND[rows] = self._decode(q_TND[rows], kv, window, bucket, batch)
        start, index = decodes, decodes
        lengths = list(zip(batch.query_lens, batch.seq_lens, strict=True))[decodes:]
        for (new, length), group in groupby(lengths):
            count = len(list(group))
            if new < length:  # a cached prefix: each sequence gathers its own blocks
                for one in range(index, index + count):
                    part = slice(start, start + new)
                    keys, values = self._gather_prefix(kv, batch, one)
                    self._prefill(q_TND[part], keys, values, window, batch, out_TND[part])
                    start = part.stop
            else:
                part = slice(start, start + count * new)
                shape = (count, new, self.heads.num_kv_heads, self.heads.head_dim)
                keys, values = (x[part].view(shape).transpose(1, 2) for x in (k_TKD, v_TKD))
                self._prefill(q_TND[part], keys, values, window, batch, out_TND[part])
                start = part.stop
            index += count
        return out_TND.flatten(1)

    def _decode(self, q_SND: Tensor, kv: PagedKV, window: int | None, bucket: _Bucket, batch: ForwardBatch) -> Tensor:
        """One new token for each sequence of the bucket: two batched GEMMs over (head, sequence)."""
        heads, count = self.heads, bucket.count
        batched = heads.num_kv_heads * count
        gathered = self._gather(kv, bucket, batch)
        q_KSGD = q_SND.view(count, heads.num_kv_heads, heads.group, heads.head_dim).transpose(0, 1)
        q = q_KSGD.reshape(batched, heads.group, heads.head_dim)
        bias = self._decode_bias(bucket, window, q.dtype, batch)
        scores = torch.baddbmm(bias, q, gathered[0].transpose(1, 2), alpha=heads.scale)
        out_KSGD = torch.bmm(scores.softmax(-1), gathered[1]).view(heads.num_kv_heads, count, heads.group, -1)
        return out_KSGD.transpose(0, 1).reshape(count, heads.num_heads, heads.head_dim)

    def _gather(self, kv: PagedKV, bucket: _Bucket, batch: ForwardBatch) -> Tensor:
        """[2, K * S, L, D]: the bucket's keys and values, for each head and sequence."""
        shape = (2, self.heads.num_kv_heads * bucket.count, -1, self.heads.head_dim)
        kept, layer = bucket.kept, kv.blocks.data_ptr()
        if kept is not None and bucket.cells is not None:
            gathered = kept.layers[layer]
            words = batch.scratch["sdpa.words"]
            new = words[: bucket.count] if bucket.rows is None else words[bucket.rows]
            as_words(gathered).index_copy_(0, bucket.cells, new.flatten(0, 1))
            return gathered
        gathered = kv.blocks.index_select(0, bucket.cache_rows).view(shape)
        if kept is not None:
            kept.layers[layer] = gathered
        return gathered

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

    def _buckets(self, kv: PagedKV, batch: ForwardBatch) -> list[_Bucket]:
        """Group the decodes so that none gathers more than about twice the blocks it has."""
        found: list[_Bucket] | None = batch.scratch.get("sdpa.buckets")
        if found is not None:
            return found
        members: dict[int, list[int]] = {}
        for row in range(batch.num_decodes):
            blocks = -(-batch.seq_lens[row] // self.block_size)
            members.setdefault(blocks.bit_length(), []).append(row)
        before, self._kept = self._kept, {}
        found = []
        for rows in members.values():
            bucket = self._bucket(kv, batch, rows, len(members) == 1, before.get(tuple(rows)))
            found.append(bucket)
            if bucket.kept is not None:
                self._kept[tuple(rows)] = bucket.kept
        batch.scratch["sdpa.buckets"] = found
        return found

    def _bucket(self, kv: PagedKV, batch: ForwardBatch, rows: list[int], alone: bool, before: _Kept | None) -> _Bucket:
        """The bucket of these rows; ``before`` is what the last step kept of them."""
        device = batch.block_tables.device
        index = torch.tensor(rows, device=device)
        own = None if alone else index
        lens = [batch.seq_lens[row] for row in rows]
        lens_S = torch.tensor(lens, device=device)
        width = -(-max(lens) // self.block_size)
        tables_SW = batch.block_tables[index, :width]
        used = torch.arange(width, device=device) < (-(-lens_S // self.block_size)).unsqueeze(1)
        now_SW = tables_SW.masked_fill(~used, -1)
        tables_SW = tables_SW.masked_fill(~used, kv.num_blocks - 1)
        if before is not None and before.is_followed_by(lens, now_SW):
            kept = _Kept(lens, now_SW, before.layers)
            heads = torch.arange(2 * self.heads.num_kv_heads, device=device) * len(rows)
            sequences = torch.arange(len(rows), device=device).unsqueeze(1)
            cells = ((heads + sequences) * kept.room + lens_S.unsqueeze(1) - 1).flatten()
            return _Bucket(own, index[:0], len(rows), kept.room // self.block_size, lens_S, kept, cells)
        fresh: _Kept | None = None
        taken = sum(len(other.lens) * (other.tables_SW.shape[1] + 1) for other in self._kept.values())
        blocks = taken + len(rows) * (width + 1)
        if blocks * self.block_size <= self._most_kept:
            fresh = _Kept(lens, now_SW, {})
            tables_SW = F.pad(tables_SW, (0, 1), value=kv.num_blocks - 1)  # room for the tokens to come
            width += 1
        return _Bucket(own, kv.rows(tables_SW.flatten()), len(rows), width, lens_S, fresh)

    def _gather_prefix(self, kv: PagedKV, batch: ForwardBatch, index: int) -> tuple[Tensor, Tensor]:
        """All keys and values of one sequence, [1, K, L, D] each, the new ones included."""
        length = batch.seq_lens[index]
        rows = kv.rows(batch.block_tables[index, : -(-length // self.block_size)])
        shape = (2, 1, self.heads.num_kv_heads, -1, self.heads.head_dim)
        keys, values = kv.blocks.index_select(0, rows).view(shape)[:, :, :, :length]
        return keys, values

    def _prefill(
        self,
        q_TND: Tensor,
        k_SKLD: Tensor,
        v_SKLD: Tensor,
        window: int | None,
        batch: ForwardBatch,
        out_TND: Tensor,
    ) -> None:
        """The last T / S of each sequence's L tokens, each over the keys up to its own, written to ``out_TND``."""
        heads, (count, _, length, _) = self.heads, k_SKLD.shape
        new = q_TND.shape[0] // count
        shape = (count, new, heads.num_kv_heads, heads.group, heads.head_dim)
        q_STKGD, out_STKGD = q_TND.view(shape), out_TND.view(shape)
        widest = heads.num_heads * length  # scores of one query at most
        size = min(new, max(_LEAST_QUERY_BLOCK, min(_QUERY_BLOCK, _MOST_SCORES // widest)))
        together = max(1, _MOST_SCORES // (widest * size))
        for first in range(0, count, together):
            some = slice(first, first + together)
            keys, values = (x[some].reshape(-1, length, heads.head_dim) for x in (k_SKLD, v_SKLD))
            for start in range(0, new, size):
                stop = min(start + size, new)
                end = length - new + stop
                begin = 0 if window is None else max(0, length - new + start + 1 - window)
                q_SKGTD = q_STKGD[some, start:stop].permute(0, 2, 3, 1, 4)
                q = q_SKGTD.reshape(len(keys), -1, heads.head_dim)
                # With beta 0 the first argument is not read.
                scores = torch.baddbmm(q[:1, :1, :1], q, keys[:, begin:end].transpose(1, 2), beta=0, alpha=heads.scale)
                bias = self._causal_bias(stop - start, end - begin, window, scores, batch)
                scores[:, :, -bias.shape[1] :] += bias
                out = torch.bmm(scores.softmax(-1), values[:, begin:end])
                out_STKGD[some, start:stop] = out.view(q_SKGTD.shape).permute(0, 3, 1, 2, 4)

    def _causal_bias(self, new: int, width: int, window: int | None, like: Tensor, batch: ForwardBatch) -> Tensor:
        """[G * new, columns] to add to the last columns of a block's scores: 0 where one of ``new`` queries, the last
        of ``width`` tokens, may look, -inf elsewhere; the same for each head of a group.

        Without a window every query sees all columns before the block's own, so these need no bias.
        """
        columns = new if window is None else width
        key = f"sdpa.bias.{new}.{columns}.{window}"
        found: Tensor | None = batch.scratch.get(key)
        if found is None:
            query = torch.arange(columns - new, columns, device=like.device).unsqueeze(1)
            keys = torch.arange(columns, device=like.device)
            hidden = keys > query
            if window is not None:
                hidden |= keys <= query - window
            found = like.new_zeros(new, columns).masked_fill_(hidden, float("-inf")).repeat(self.heads.group, 1)
            batch.scratch[key] = found
        return found
