"""Attention in plain torch: the CPU's backend, and the reference on GPUs.

The cache (``sdpa_cache``) is gathered block by block into matrices that batched GEMMs read at full speed.

A decode multiplies with everything in its sequence's last block, and with as many blocks as the longest sequence has;
what is not its own gets the weight 0. A NaN would survive that: a block is emptied when its first token comes, and for
blocks that a sequence does not have one is gathered that nothing is ever written to.

The query heads of a group are packed: the G heads that read one KV head become G rows of one matrix, so that each
key is multiplied with all of them at once and never repeated.

Which decodes are gathered together, and what is kept of it, is in ``sdpa_gathering``; prompts are in ``sdpa_prompts``.

Of layers with a window, whose pool keeps only its blocks, a sequence is taken to begin with the block in which its
window does: causality and window are the same from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tpctl.accounting import KvLayout, LayerPools, pools_of, slab_bytes
from tpctl.layers.attention import sdpa_gathering, sdpa_prompts
from tpctl.layers.attention.base import AttentionBackend, AttentionPlan, AttentionSpec, LayerKV, kept_layer
from tpctl.layers.attention.heads import HeadPreparation
from tpctl.layers.attention.sdpa_cache import PagedKV, Storage, as_words, own_storage, shared_storage
from tpctl.layers.attention.sdpa_gathering import Bucket, Gathering
from tpctl.layers.attention.sdpa_prompts import CausalBiases, prefill, scores_of, softmax
from tpctl.layers.attention.sdpa_runs import Runs, find_runs
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.instructions import product_dtype


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

    buckets: dict[int, list[Bucket]] = field(default_factory=dict)
    begun: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    cells: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    new: Tensor | None = None
    runs: dict[int, list[Runs]] = field(default_factory=dict)
    shared: dict[int, Tensor] = field(default_factory=dict)
    gathered: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    again: bool = False
    decode_biases: dict[tuple[int, int, AttentionSpec], Tensor] = field(default_factory=dict)
    causal_biases: CausalBiases = field(default_factory=dict)


class SdpaBackend(AttentionBackend[SdpaPlan]):
    name = "sdpa"

    def __init__(self, layers: Sequence[AttentionSpec], block_size: int, pools: LayerPools | None = None) -> None:
        super().__init__(layers, block_size, pools)
        self._gathering = self._gatherings([0] * len(self.pools.windows), 0)
        self._products: torch.dtype | None = None  # in which queries, keys and values are multiplied

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the numbers in the cache."""
        return dtype

    def allocate(
        self, num_slabs: int, dtype: torch.dtype, device: torch.device, layout: KvLayout | None = None
    ) -> list[LayerKV]:
        kept, kind = [kept_layer(spec) for spec in self.layers], self.kept_dtype(dtype)
        self._products = product_dtype(dtype, device)
        sizes = [layer.token_bytes(self._products.itemsize, "model") for layer in kept]
        token_bytes = [
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
        self._gathering = self._gatherings(token_bytes, min(sdpa_gathering.MOST_KEPT, whole // 4))
        return list(self._layers(storages, dtype))

    def _gatherings(self, token_bytes: Sequence[int], most: int) -> Gathering:
        return Gathering(self.block_size, self.pools.windows, token_bytes, most)

    def _layers(self, storages: Sequence[Storage], dtype: torch.dtype) -> list[PagedKV]:
        layers = zip(self.layers, self.pools.of_layer, storages, strict=True)
        return [self._layer(*layer, dtype) for layer in layers]

    def _layer(self, spec: AttentionSpec, pool: int, storage: Storage, dtype: torch.dtype) -> PagedKV:
        """One layer's cache."""
        at = storage
        return PagedKV(spec, *at.sides, at.blocks, at.cells, at.first, at.empty_id, at.layer, pool=pool)

    def forget(self) -> None:
        self._gathering.forget()

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
            prefill(q_TND[part], keys, values, spec, plan.causal_biases, out_TND[part], sinks_N, self._products)
        return out_TND.flatten(1)

    def _runs(self, kv: PagedKV, plan: SdpaPlan) -> list[Runs]:
        """Sequences with few new tokens, which are multiplied together."""
        if kv.pool not in plan.runs:
            most = sdpa_prompts.MOST_SCORES // max(spec.num_heads for spec in self.layers)
            first = partial(self._gathering.first_block, kv.pool)
            plan.runs[kv.pool] = find_runs(plan.batch, kv.pool, first, self.block_size, kv.empty_id, most)
        return plan.runs[kv.pool]

    def _attend_runs(self, q_TND: Tensor, kv: PagedKV, runs: Runs, out_TND: Tensor, sinks_N: Tensor | None) -> None:
        """As ``_decode``, with several rows of a sequence, into those of ``out_TND``."""
        spec, (count, rows) = kv.spec, runs.shape
        heads, group = spec.num_kv_heads, spec.group
        gathered = self._numbers(kv, runs.blocks).view(kv.vectors // heads, heads * count, -1, spec.head_dim)
        q_SnKGD = q_TND[runs.rows_Sn.flatten()].view(count, rows, heads, group, spec.head_dim)
        q = q_SnKGD.permute(2, 0, 1, 3, 4).reshape(heads * count, rows * group, spec.head_dim).to(gathered.dtype)
        scores = scores_of(runs.bias(spec, q, gathered.shape[2]), q, gathered[0], spec)
        sinks = None if sinks_N is None else sinks_N.view(heads, 1, 1, group).expand(-1, count, rows, -1)
        out = torch.bmm(softmax(scores, sinks), kv.values(gathered)).view(heads, count, rows, group, -1)
        out = out.permute(1, 2, 0, 3, 4).reshape(count * rows, heads * group, -1)
        out_TND[runs.rows] = out[runs.taken].to(out_TND.dtype)

    def decodes(self, q_SND: Tensor, kv: PagedKV, plan: SdpaPlan, sinks_N: Tensor | None = None) -> Tensor | None:
        """[S, N, D of values]: the step's decodes; ``None``: it has none."""
        if kv.pool not in plan.buckets:
            plan.buckets[kv.pool] = self._gathering.buckets(kv, plan.batch)
        buckets = plan.buckets[kv.pool]
        if len(buckets) < 2:
            return self._decode(q_SND, kv, 0, buckets[0], plan, sinks_N) if buckets else None
        parts = [self._decode(q_SND[one.rows], kv, at, one, plan, sinks_N) for at, one in enumerate(buckets)]
        out_SND = parts[0].new_empty(len(q_SND), *parts[0].shape[1:])
        for bucket, part in zip(buckets, parts, strict=True):
            out_SND[bucket.rows] = part
        return out_SND

    def _decode(
        self, q_SND: Tensor, kv: PagedKV, index: int, bucket: Bucket, plan: SdpaPlan, sinks_N: Tensor | None
    ) -> Tensor:
        """One new token for each sequence of the bucket: two batched GEMMs over (head, sequence)."""
        spec, count = kv.spec, bucket.count
        batched = spec.num_kv_heads * count
        gathered = self._gathered(kv, index, bucket, plan)
        q_KSGD = q_SND.view(count, spec.num_kv_heads, spec.group, spec.head_dim).transpose(0, 1)
        q = q_KSGD.reshape(batched, spec.group, spec.head_dim).to(gathered.dtype)
        scores = scores_of(self._decode_bias(kv, index, bucket, q.dtype, plan), q, gathered[0], spec)
        sinks_KSG = None if sinks_N is None else sinks_N.view(-1, 1, spec.group).expand(-1, count, -1)
        out_KSGD = torch.bmm(softmax(scores, sinks_KSG), kv.values(gathered))
        out_KSGD = out_KSGD.view(spec.num_kv_heads, count, spec.group, -1)
        return out_KSGD.transpose(0, 1).reshape(count, spec.num_heads, -1).to(q_SND.dtype)

    def _gathered(self, kv: PagedKV, index: int, bucket: Bucket, plan: SdpaPlan) -> Tensor:
        """What ``_gather`` gives, or gave a layer before whose keys and values these are."""
        if not kv.spec.shared:
            return self._gather(kv, bucket, plan)
        if not plan.again:
            plan.gathered[kv.layer, index] = self._gather(kv, bucket, plan)
        return plan.gathered[kv.layer, index]

    def _gather(self, kv: PagedKV, bucket: Bucket, plan: SdpaPlan) -> Tensor:
        """[2, K * S, L, D]: the bucket's keys and values, by head and sequence; [1, ..] where keys hold values."""
        heads = kv.spec.num_kv_heads
        shape = (kv.vectors // heads, heads * bucket.count, -1, kv.spec.head_dim)
        kept, layer = bucket.kept, kv.layer
        if kept is not None and bucket.cells is not None:
            gathered = kept.layers[layer]
            assert plan.new is not None
            new = plan.new[: bucket.count] if bucket.rows is None else plan.new[bucket.rows]
            as_words(gathered).index_copy_(0, bucket.cells_of(kv.vectors), as_words(new.to(gathered.dtype)))
            return gathered
        gathered = self._numbers(kv, bucket.blocks).view(shape)
        if kept is not None:
            kept.layers[layer] = gathered
        return gathered

    def _numbers(self, kv: PagedKV, block_ids: Tensor) -> Tensor:
        """What these blocks hold of every head, as it is multiplied: [rows, B * D]."""
        return kv.gather(kv.rows(block_ids)).to(self._products)

    def _decode_bias(self, kv: PagedKV, index: int, bucket: Bucket, dtype: torch.dtype, plan: SdpaPlan) -> Tensor:
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

    def gather_prefix(self, kv: PagedKV, batch: ForwardBatch, index: int) -> Tensor:
        """[2, 1, K, L, D]: the keys and values of one sequence, the new ones included, from the first block on that a
        new one sees; or [1, 1, 1, L, D], as ``_gather``."""
        length = batch.seq_lens[index]
        first = self._gathering.first_block(kv.pool, length - batch.query_lens[index])
        table = batch.pools[kv.pool].block_tables[index]
        rows = kv.rows(table[first : -(-length // self.block_size)])
        heads = kv.spec.num_kv_heads
        shape = (kv.vectors // heads, 1, heads, -1, kv.spec.head_dim)
        return kv.gather(rows).view(shape)[:, :, :, : length - first * self.block_size]
