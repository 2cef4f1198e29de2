"""Attention in plain torch: the CPU's backend, and the reference on GPUs.

The cache (``sdpa_cache``) is gathered block by block into matrices that batched GEMMs read at full speed.

A decode multiplies with everything in its sequence's last block, and with as many blocks as the longest sequence has;
what is not its own gets the weight 0. A NaN would survive that: a block is emptied when its first token comes, and for
blocks that a sequence does not have one is gathered that nothing is ever written to.

The query heads of a group are packed: the G heads that read one KV head become G rows of one matrix, so that each
key is multiplied with all of them at once and never repeated.

While the same sequences decode, what was gathered is kept, and each step adds its new keys and values to it: gathering
is the dearest part of a step after the linears.

Of layers with a window, whose pool keeps only its blocks, a sequence is taken to begin with the block in which its
window does: causality and window are the same from there.

Prefill goes block by block of queries. A block multiplies with no key behind its last query or before its first
query's window, and its scores are the largest thing in memory, however long the context is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.accounting import KvLayout, LayerPools, pools_of, slab_bytes
from tpctl.layers.attention.base import AttentionBackend, AttentionPlan, AttentionSpec, LayerKV, kept_layer
from tpctl.layers.attention.heads import HeadPreparation
from tpctl.layers.attention.sdpa_cache import PagedKV, Storage, as_words, own_storage, shared_storage
from tpctl.layers.attention.sdpa_runs import Runs, find_runs
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

    ``tables_SW`` is -1 behind a sequence's own blocks. ``layers`` holds [2, K * S, L, D] (of latent attention
    [1, S, L, D]) for each layer; there is room for L tokens.
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

    Attributes:
        rows: their rows of the batch (``None``: all decodes, in order).
        blocks: int64 [S * width], the blocks of each, padded with the empty one.
        lens_S: how many of the gathered keys are a sequence's own.
        cells: int64 [S, 1], where ``kept`` goes on with the step before: the rows of one head's words that the new
            tokens take.
    """

    rows: Tensor | None
    blocks: Tensor
    count: int
    width: int
    lens_S: Tensor
    kept: _Kept | None = None
    cells: Tensor | None = None
    _cells_of: dict[int, Tensor] = field(default_factory=dict)

    def cells_of(self, vectors: int) -> Tensor:
        """The same for that many vectors of a token, keys and values of all heads, token by token."""
        assert self.cells is not None and self.kept is not None
        found = self._cells_of.get(vectors)
        if found is None:
            heads = torch.arange(vectors, device=self.cells.device) * (self.count * self.kept.room)
            found = self._cells_of[vectors] = (self.cells + heads).flatten()
        return found


@dataclass
class SdpaPlan(AttentionPlan):
    """A step, with what one layer finds out for those that are alike.

    Attributes:
        buckets, begun, cells: by pool; the latter two also by the vectors of a token.
        new: [T, 2 K, D], the new keys and values of the layer that is being computed, as its cache keeps them.
        runs: by pool, short runs of new tokens behind a prefix.
        biases: of decodes, by pool, bucket and window; of prompts, by queries, columns and window.
        shared, gathered: of layers whose keys and values later ones read, by ``PagedKV.layer``: ``new``, and what
            each bucket gathered.
        again: whether the layer that is being computed reads those of an earlier one.
    """

    buckets: dict[int, list[_Bucket]] = field(default_factory=dict)
    begun: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    cells: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    new: Tensor | None = None
    runs: dict[int, list[Runs]] = field(default_factory=dict)
    shared: dict[int, Tensor] = field(default_factory=dict)
    gathered: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    again: bool = False
    decode_biases: dict[tuple[int, int, AttentionSpec], Tensor] = field(default_factory=dict)
    causal_biases: dict[tuple[int, int, AttentionSpec], Tensor] = field(default_factory=dict)


class SdpaBackend(AttentionBackend[SdpaPlan]):
    name = "sdpa"
    default_block_size = 32

    def __init__(self, layers: Sequence[AttentionSpec], block_size: int, pools: LayerPools | None = None) -> None:
        super().__init__(layers, block_size, pools)
        self._kept: dict[tuple[int, ...], _Kept] = {}  # by pool and the rows of a bucket
        self._most_kept = 0  # bytes
        self._token_bytes: list[int] = []  # of a token gathered in each pool

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the numbers in the cache."""
        return dtype

    def allocate(
        self, num_slabs: int, dtype: torch.dtype, device: torch.device, layout: KvLayout | None = None
    ) -> list[LayerKV]:
        kept, kind = [kept_layer(spec) for spec in self.layers], self.kept_dtype(dtype)
        self._kept = {}
        sizes = [layer.token_bytes(dtype.itemsize, "model") for layer in kept]
        self._token_bytes = [
            sum(size for size, other in zip(sizes, self.pools.of_layer, strict=True) if other == pool)
            for pool in range(len(self.pools.windows))
        ]
        pools = self.layer_pools(dtype)
        if len(pools) == 1:
            whole = num_slabs * pools[0].block_bytes
            storages = [
                own_storage(number, one.vectors, num_slabs, self.block_size, one.dim, kind, device)
                for number, one in enumerate(kept)
            ]
        else:
            assert layout is not None
            whole = num_slabs * slab_bytes(pools, layout)
            vectors = pools_of(kept, self.pools, self.block_size, kind.itemsize, "model")
            storages = shared_storage(kept, self.pools, layout, num_slabs, slab_bytes(vectors, layout), kind, device)
            by_pool = dict(zip(self.pools.of_layer, storages, strict=True))
            self.places = tuple(by_pool[pool].place for pool in range(len(pools)))
        self._most_kept = min(_MOST_KEPT, whole // 4)
        return list(self._layers(storages, dtype))

    def _layers(self, storages: Sequence[Storage], dtype: torch.dtype) -> list[PagedKV]:
        layers = zip(self.layers, self.pools.of_layer, storages, strict=True)
        return [self._layer(*layer, dtype) for layer in layers]

    def _layer(self, spec: AttentionSpec, pool: int, storage: Storage, dtype: torch.dtype) -> PagedKV:
        """One layer's cache."""
        at = storage
        return PagedKV(spec, *at.sides, at.blocks, at.cells, at.first, at.empty_id, at.layer, pool=pool)

    def begin(self, batch: ForwardBatch) -> SdpaPlan:
        return SdpaPlan(batch)

    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: SdpaPlan) -> None:
        assert isinstance(kv, PagedKV)
        self.write(torch.cat((k_TKD, v_TKD), dim=1), kv, plan)

    def write(self, new: Tensor, kv: PagedKV, plan: SdpaPlan) -> None:
        """Write [T, vectors, D] to the slots of the new tokens."""
        begun = self._begun(kv, plan)
        if begun is not None:
            kv.empty(begun)
        cells, rows = self._cells(kv, plan)
        plan.new = kv.write(cells, new, rows)
        if kv.spec.shared:
            plan.shared[kv.layer] = plan.new

    def run_again(self, q: Tensor, prepare: HeadPreparation, kv: LayerKV, plan: AttentionPlan) -> Tensor:
        """[T, N * D]: attention of queries [T, N * D] to the keys and values that an earlier layer has stored in this
        step and before, in ``kv``."""
        assert isinstance(kv, PagedKV) and isinstance(plan, SdpaPlan)
        q_TND = prepare.queries(q, kv.spec.num_heads, plan.angles(prepare.rotary, q.dtype))
        plan.new, plan.again = plan.shared[kv.layer], True
        k_TKD, v_TKD = plan.new.chunk(2, dim=1)
        found = self.attend(q_TND, k_TKD, v_TKD, kv, plan)
        plan.again = False
        return found

    def _begun(self, kv: PagedKV, plan: SdpaPlan) -> Tensor | None:
        """Rows of ``kv.blocks``: the blocks whose first tokens are among the new ones, and that these do not fill."""
        key, batch = (kv.pool, kv.vectors), plan.batch
        if key not in plan.begun:
            plan.begun[key] = None
            found = []
            for sequence, (new, length) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
                filled = length % self.block_size
                if 0 < filled <= new:
                    found.append((sequence, length // self.block_size))
            if found:
                tables = batch.pools[kv.pool].block_tables
                sequences, blocks = torch.tensor(found, device=tables.device).unbind(1)
                plan.begun[key] = kv.rows(tables[sequences, blocks])
        return plan.begun[key]

    def _cells(self, kv: PagedKV, plan: SdpaPlan) -> tuple[Tensor, Tensor | None]:
        """Where to write: rows of ``kv.cells``, all heads of a token together; and the rows of T they come from
        (``None``: every row)."""
        key = (kv.pool, kv.vectors)
        batch, found = plan.batch, plan.cells.get(key)
        if found is None:
            slots = batch.pools[kv.pool].slot_mapping
            kept = (slots >= 0).nonzero().flatten()
            rows = kept if kept.numel() < batch.num_tokens else None
            slots = slots if rows is None else slots[rows]
            found = plan.cells[key] = ((slots.unsqueeze(1) + kv.first * self.block_size).flatten(), rows)
        return found

    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: SdpaPlan, sinks_N: Tensor | None = None
    ) -> Tensor:
        assert isinstance(kv, PagedKV)
        batch, spec = plan.batch, kv.spec
        decodes = batch.num_decodes
        decoded = self.decodes(q_TND[:decodes], kv, plan, sinks_N)
        if decoded is not None and decodes == batch.num_tokens:
            return decoded.flatten(1)
        out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        if decoded is not None:
            out_TND[:decodes] = decoded
        alike = self._runs(kv, plan)
        for runs in alike:
            self._attend_runs(q_TND, kv, runs, out_TND, sinks_N)
        together = {sequence for runs in alike for sequence in runs.sequences}
        for part, count, cached in batch.prompts():
            if cached in together:
                continue
            if cached is not None:
                keys, values = self.gather_prefix(kv, batch, cached)
            else:
                shape = (count, -1, spec.num_kv_heads, spec.head_dim)
                keys, values = (x[part].view(shape).transpose(1, 2) for x in (k_TKD, v_TKD))
            self.prefill(q_TND[part], keys, values, spec, plan, out_TND[part], sinks_N)
        return out_TND.flatten(1)

    def _runs(self, kv: PagedKV, plan: SdpaPlan) -> list[Runs]:
        """Sequences with few new tokens, which are multiplied together."""
        if kv.pool not in plan.runs:
            most = _MOST_SCORES // max(spec.num_heads for spec in self.layers)
            first = partial(self._first_block, kv.pool)
            plan.runs[kv.pool] = find_runs(plan.batch, kv.pool, first, self.block_size, kv.empty_id, most)
        return plan.runs[kv.pool]

    def _attend_runs(self, q_TND: Tensor, kv: PagedKV, runs: Runs, out_TND: Tensor, sinks_N: Tensor | None) -> None:
        """As ``_decode``, with several rows of a sequence, into those of ``out_TND``."""
        spec, (count, rows) = kv.spec, runs.shape
        heads, group = spec.num_kv_heads, spec.group
        gathered = kv.gather(kv.rows(runs.blocks)).view(kv.vectors // heads, heads * count, -1, spec.head_dim)
        q_SnKGD = q_TND[runs.rows_Sn.flatten()].view(count, rows, heads, group, spec.head_dim)
        q = q_SnKGD.permute(2, 0, 1, 3, 4).reshape(heads * count, rows * group, spec.head_dim)
        scores = _scores(runs.bias(spec, q, gathered.shape[2]), q, gathered[0], spec)
        sinks = None if sinks_N is None else sinks_N.view(heads, 1, 1, group).expand(-1, count, rows, -1)
        out = torch.bmm(_softmax(scores, sinks), kv.values(gathered)).view(heads, count, rows, group, -1)
        out_TND[runs.rows] = out.permute(1, 2, 0, 3, 4).reshape(count * rows, heads * group, -1)[runs.taken]

    def decodes(self, q_SND: Tensor, kv: PagedKV, plan: SdpaPlan, sinks_N: Tensor | None = None) -> Tensor | None:
        """[S, N, D of values]: the step's decodes; ``None``: it has none."""
        buckets = self._buckets(kv, plan)
        if len(buckets) < 2:
            return self._decode(q_SND, kv, 0, buckets[0], plan, sinks_N) if buckets else None
        parts = [self._decode(q_SND[one.rows], kv, at, one, plan, sinks_N) for at, one in enumerate(buckets)]
        out_SND = parts[0].new_empty(len(q_SND), *parts[0].shape[1:])
        for bucket, part in zip(buckets, parts, strict=True):
            out_SND[bucket.rows] = part
        return out_SND

    def _decode(
        self, q_SND: Tensor, kv: PagedKV, index: int, bucket: _Bucket, plan: SdpaPlan, sinks_N: Tensor | None
    ) -> Tensor:
        """One new token for each sequence of the bucket: two batched GEMMs over (head, sequence)."""
        spec, count = kv.spec, bucket.count
        batched = spec.num_kv_heads * count
        gathered = self._gathered(kv, index, bucket, plan)
        q_KSGD = q_SND.view(count, spec.num_kv_heads, spec.group, spec.head_dim).transpose(0, 1)
        q = q_KSGD.reshape(batched, spec.group, spec.head_dim)
        scores = _scores(self._decode_bias(kv, index, bucket, q.dtype, plan), q, gathered[0], spec)
        sinks_KSG = None if sinks_N is None else sinks_N.view(-1, 1, spec.group).expand(-1, count, -1)
        out_KSGD = torch.bmm(_softmax(scores, sinks_KSG), kv.values(gathered))
        out_KSGD = out_KSGD.view(spec.num_kv_heads, count, spec.group, -1)
        return out_KSGD.transpose(0, 1).reshape(count, spec.num_heads, -1)

    def _gathered(self, kv: PagedKV, index: int, bucket: _Bucket, plan: SdpaPlan) -> Tensor:
        """What ``_gather`` gives, or gave a layer before whose keys and values these are."""
        if not kv.spec.shared:
            return self._gather(kv, bucket, plan)
        if not plan.again:
            plan.gathered[kv.layer, index] = self._gather(kv, bucket, plan)
        return plan.gathered[kv.layer, index]

    def _gather(self, kv: PagedKV, bucket: _Bucket, plan: SdpaPlan) -> Tensor:
        """[2, K * S, L, D]: the bucket's keys and values, by head and sequence; [1, ..] where keys hold values."""
        heads = kv.spec.num_kv_heads
        shape = (kv.vectors // heads, heads * bucket.count, -1, kv.spec.head_dim)
        kept, layer = bucket.kept, kv.layer
        if kept is not None and bucket.cells is not None:
            gathered = kept.layers[layer]
            assert plan.new is not None
            new = plan.new[: bucket.count] if bucket.rows is None else plan.new[bucket.rows]
            as_words(gathered).index_copy_(0, bucket.cells_of(kv.vectors), as_words(new))
            return gathered
        gathered = kv.gather(kv.rows(bucket.blocks)).view(shape)
        if kept is not None:
            kept.layers[layer] = gathered
        return gathered

    def _decode_bias(self, kv: PagedKV, index: int, bucket: _Bucket, dtype: torch.dtype, plan: SdpaPlan) -> Tensor:
        """[K * S, G, L] for the bucket's gathered keys: 0 for a sequence's own, -inf for others."""
        spec, key = kv.spec, (kv.pool, index, kv.spec)
        found = plan.decode_biases.get(key)
        if found is None:
            lens_S1 = bucket.lens_S.unsqueeze(1)
            positions_L = torch.arange(bucket.width * self.block_size, device=lens_S1.device)
            hidden_SL = positions_L >= lens_S1
            if spec.window is not None:
                hidden_SL |= positions_L < lens_S1 - spec.window
            bias_SL = torch.zeros(hidden_SL.shape, dtype=dtype, device=lens_S1.device)
            bias_SL.masked_fill_(hidden_SL, float("-inf"))
            found = bias_SL.unsqueeze(1).repeat(spec.num_kv_heads, spec.group, 1)
            plan.decode_biases[key] = found
        return found

    def _buckets(self, kv: PagedKV, plan: SdpaPlan) -> list[_Bucket]:
        """Group the decodes so that none gathers more than about twice the blocks it has."""
        pool, batch = kv.pool, plan.batch
        if pool in plan.buckets:
            return plan.buckets[pool]
        firsts = [self._first_block(pool, length - 1) for length in batch.seq_lens[: batch.num_decodes]]
        lens = [length - first * self.block_size for length, first in zip(batch.seq_lens, firsts, strict=False)]
        members: dict[int, list[int]] = {}
        for row, length in enumerate(lens):
            members.setdefault((-(-length // self.block_size)).bit_length(), []).append(row)
        before = {key: self._kept.pop(key) for key in list(self._kept) if key[0] == pool}
        found = []
        for rows in members.values():
            key, alone = (pool, *rows), len(members) == 1
            bucket = self._bucket(kv, batch, rows, firsts, lens, alone, before.get(key))
            found.append(bucket)
            if bucket.kept is not None:
                self._kept[key] = bucket.kept
        plan.buckets[pool] = found
        return found

    def _first_block(self, pool: int, query: int) -> int:
        """The first block that a query at that position sees, in a pool's layers."""
        window = self.pools.windows[pool]
        return 0 if window is None else max(0, query + 1 - window) // self.block_size

    def _bucket(
        self,
        kv: PagedKV,
        batch: ForwardBatch,
        rows: list[int],
        firsts: list[int],
        all_lens: list[int],
        alone: bool,
        before: _Kept | None,
    ) -> _Bucket:
        """The bucket of these rows, each sequence from its block ``firsts`` on, of ``all_lens`` tokens; ``before`` is
        what the last step kept of them."""
        tables = batch.pools[kv.pool].block_tables
        device = tables.device
        index = torch.tensor(rows, device=device)
        own = None if alone else index
        lens = [all_lens[row] for row in rows]
        lens_S = torch.tensor(lens, device=device)
        width = -(-max(lens) // self.block_size)
        if any(firsts):
            columns_SW = torch.tensor([firsts[row] for row in rows], device=device).unsqueeze(1)
            columns_SW = columns_SW + torch.arange(width, device=device)
            tables_SW = tables[index].gather(1, columns_SW.clamp(max=tables.shape[1] - 1))
        else:
            tables_SW = tables[index, :width]
        used = torch.arange(width, device=device) < (-(-lens_S // self.block_size)).unsqueeze(1)
        now_SW = tables_SW.masked_fill(~used, -1)
        tables_SW = tables_SW.masked_fill(~used, kv.empty_id)
        if before is not None and before.is_followed_by(lens, now_SW):
            kept = _Kept(lens, now_SW, before.layers)
            sequences = torch.arange(len(rows), device=device).unsqueeze(1)
            cells = sequences * kept.room + lens_S.unsqueeze(1) - 1
            return _Bucket(own, index[:0], len(rows), kept.room // self.block_size, lens_S, kept, cells)
        fresh: _Kept | None = None
        taken = sum(
            len(other.lens) * (other.tables_SW.shape[1] + 1) * self._token_bytes[pool]
            for (pool, *_), other in self._kept.items()
        )
        taken += len(rows) * (width + 1) * self._token_bytes[kv.pool]
        if taken * self.block_size <= self._most_kept:
            fresh = _Kept(lens, now_SW, {})
            tables_SW = F.pad(tables_SW, (0, 1), value=kv.empty_id)  # room for the tokens to come
            width += 1
        return _Bucket(own, tables_SW.flatten(), len(rows), width, lens_S, fresh)

    def gather_prefix(self, kv: PagedKV, batch: ForwardBatch, index: int) -> Tensor:
        """[2, 1, K, L, D]: the keys and values of one sequence, the new ones included, from the first block on that a
        new one sees; or [1, 1, 1, L, D], as ``_gather``."""
        length = batch.seq_lens[index]
        first = self._first_block(kv.pool, length - batch.query_lens[index])
        table = batch.pools[kv.pool].block_tables[index]
        rows = kv.rows(table[first : -(-length // self.block_size)])
        heads = kv.spec.num_kv_heads
        shape = (kv.vectors // heads, 1, heads, -1, kv.spec.head_dim)
        return kv.gather(rows).view(shape)[:, :, :, : length - first * self.block_size]

    def prefill(
        self,
        q_TND: Tensor,
        k_SKLD: Tensor,
        v_SKLD: Tensor,
        spec: AttentionSpec,
        plan: SdpaPlan,
        out_TND: Tensor,
        sinks_N: Tensor | None = None,
    ) -> None:
        """The last T / S of each sequence's L tokens, each over the keys up to its own, written to ``out_TND``. Values
        may have another size than keys."""
        count, _, length, _ = k_SKLD.shape
        new = q_TND.shape[0] // count
        shape = (count, new, spec.num_kv_heads, spec.group, spec.head_dim)
        q_STKGD, out_STKGD = q_TND.view(shape), out_TND.view(*shape[:-1], -1)
        widest = spec.num_heads * length  # scores of one query at most
        size = min(new, max(_LEAST_QUERY_BLOCK, min(_QUERY_BLOCK, _MOST_SCORES // widest)))
        together = max(1, _MOST_SCORES // (widest * size))
        for first in range(0, count, together):
            some = slice(first, first + together)
            keys, values = (x[some].reshape(-1, length, x.shape[-1]) for x in (k_SKLD, v_SKLD))
            for start in range(0, new, size):
                stop = min(start + size, new)
                end = length - new + stop
                begin = 0 if spec.window is None else max(0, length - new + start + 1 - spec.window)
                q_SKGTD = q_STKGD[some, start:stop].permute(0, 2, 3, 1, 4)
                q = q_SKGTD.reshape(len(keys), -1, spec.head_dim)
                scores = _scores(None, q, keys[:, begin:end], spec)
                bias = self._causal_bias(stop - start, end - begin, spec, scores, plan)
                scores[:, :, -bias.shape[1] :] += bias
                sinks_SKGT = None
                if sinks_N is not None:
                    sinks_SKGT = sinks_N.view(1, -1, spec.group, 1).expand(*q_SKGTD.shape[:-1])
                out = torch.bmm(_softmax(scores, sinks_SKGT), values[:, begin:end])
                out_STKGD[some, start:stop] = out.view(*q_SKGTD.shape[:-1], -1).permute(0, 3, 1, 2, 4)

    def _causal_bias(self, new: int, width: int, spec: AttentionSpec, like: Tensor, plan: SdpaPlan) -> Tensor:
        """[G * new, columns] to add to the last columns of a block's scores: 0 where one of ``new`` queries, the last
        of ``width`` tokens, may look, -inf elsewhere; the same for each head of a group.

        Without a window every query sees all columns before the block's own, so these need no bias.
        """
        columns = new if spec.window is None else width
        found = plan.causal_biases.get((new, columns, spec))
        if found is None:
            query = torch.arange(columns - new, columns, device=like.device).unsqueeze(1)
            keys = torch.arange(columns, device=like.device)
            hidden = keys > query
            if spec.window is not None:
                hidden |= keys <= query - spec.window
            found = like.new_zeros(new, columns).masked_fill_(hidden, float("-inf")).repeat(spec.group, 1)
            plan.causal_biases[new, columns, spec] = found
        return found


def _scores(bias: Tensor | None, q: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
    """``q keys^T * scale``, capped, plus ``bias``, for batches of matrices."""
    if spec.softcap is None:
        beta = 0 if bias is None else 1  # with 0 the first argument is not read
        return torch.baddbmm(
            q[:1, :1, :1] if bias is None else bias, q, keys.transpose(1, 2), beta=beta, alpha=spec.scale
        )
    scores = torch.bmm(q, keys.transpose(1, 2)).mul_(spec.scale / spec.softcap).tanh_().mul_(spec.softcap)
    return scores if bias is None else scores.add_(bias)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights of scores [.., rows, L]; ``sinks``, of as many elements as there are rows, join their sums."""
    if sinks is None:
        return scores.softmax(-1)
    joined = torch.cat((scores, sinks.reshape(*scores.shape[:-1], 1)), dim=-1)
    return joined.softmax(-1)[..., :-1]
