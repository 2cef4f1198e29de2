"""Runs steps on a GPU, one ahead of their results.

A step's sampled tokens stay on the device, where the next step reads them; the host learns them one step later. The
host's work per step is a few integers per row and one copy, so it schedules step N + 1 while step N computes.

Decodes are replayed from CUDA graphs (``engine.steps.graphs``), and so are steps of decodes and a few hundred prompt
tokens (``engine.steps.mixed``); other steps with prefill chunks are launched kernel by kernel.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpctl.engine.runners.cuda_memory import StepMemory
from tpctl.engine.runners.cuda_sizes import paged
from tpctl.engine.runners.cuda_steps import CudaSteps
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.runners.memory_plan import MemoryPlan
from tpctl.engine.runners.row_cost import gpu_cost
from tpctl.engine.runners.runner import Launched, ModelRunner, sampling_rows
from tpctl.engine.runners.step_set import StepSet
from tpctl.engine.sampling.noise import noise_keys
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.steps.graphs import CapturedSteps
from tpctl.engine.steps.states import NUMBERS, StepStates, decode_slots, flat
from tpctl.errors import EngineError
from tpctl.kernels.attention.shared_prefix import PREFIX_STEP
from tpctl.kernels.delta_net.chunks import ChunkTables
from tpctl.layers.batch import ForwardBatch, PoolTables, StateTables
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.wire.report import EngineInfo, TokenLogprob

LOST_PEER = "a rank waited two minutes for another one, which hangs or was stopped"
_SHARED_ROWS, _SHARED_TOKENS = 48, 256  # what attending to a common prefix for all at once needs to pay
_RING = 3  # result buffers: one being read, one being filled, one to spare


@dataclass
class CudaLaunched(Launched):
    """``ready`` is recorded behind the copy of the token ids into ``host``."""

    host: Tensor | None = None
    ready: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class CudaRunner(ModelRunner):
    """One rank on one GPU, for the backends that read the paged cache in place."""

    states_apart = True
    steps_kind = CudaSteps

    def __init__(
        self, loaded: LoadedModel, memory: MemoryPlan, compute: CudaCompute, steps: StepMemory, pace: Pace | None
    ) -> None:
        super().__init__(loaded, memory, pace)
        self.row_cost = gpu_cost(loaded)
        self._paged = paged(loaded)
        self._compute = compute
        self.most_rows = loaded.settings.max_num_seqs
        self.steps = steps
        self._slots, self._sampled, self._on_device, self._graphs, self._mixed, self._keyed = StepSet.of(
            loaded,
            self.kv,
            compute,
            pace,
            partial(CapturedSteps, steps.captured),
            max_model_len=memory.max_model_len,
            states=memory.num_states > 0,
            kind=self.steps_kind,
        )
        rows = len(self._sampled)
        self._results = [torch.zeros(rows, dtype=torch.int64).pin_memory() for _ in range(_RING)]
        self._turn = 0
        self._references: dict[str, int] = {}

    def may_overlap(self, batch: ScheduledBatch) -> bool:
        return SamplingPath.of(batch) is not SamplingPath.HOST and not batch.has_drafts

    def launch(self, batch: ScheduledBatch) -> Launched:
        with torch.inference_mode():
            slots = self._slots.update(batch.items)
            path = SamplingPath.of(batch)
            masks = self.masks.begin(batch) if path is SamplingPath.HOST else None
            if batch.scores:
                self._eager(batch, slots, path)
            elif batch.only_answers and self._graphs is not None:
                rows = self._decode_rows(batch.items, slots)
                columns = decode_slots(batch.items) if self.memory.num_states else []
                shared = self._shared_tokens(batch.items) if len(batch.items) >= _SHARED_ROWS else 0
                self._graphs.run([*rows, *columns], self._paged.is_long(len(rows[0]), 1 + max(rows[1])), path, shared)
            elif not batch.has_drafts and self._mixed is not None and self._mixed.meet(batch):
                states = StepStates.of(batch) if self.memory.num_states else None
                self._mixed.run(*self._mixed_rows(batch, slots), path, paced=batch.paced, states=states)
            else:
                self._eager(batch, slots, path)
            if path is SamplingPath.HOST:
                return self._sample_on_host(batch, self.masks.finish(masks))
            self._references = {item.sequence.id: row for row, item in enumerate(batch.sampled)}
            host = self._results[self._turn]
            self._turn = (self._turn + 1) % _RING
            launched = CudaLaunched(batch, [], host=host)
            count = batch.num_sampled
            host[:count].copy_(self._sampled[:count], non_blocking=True)
            launched.ready.record()
            return launched

    def rest(self) -> bool:
        if self._mixed is None:
            return False
        with torch.inference_mode():
            return self._mixed.capture_missed()

    def collect(self, launched: Launched) -> tuple[list[int], list[TokenLogprob | None] | None]:
        if isinstance(launched, CudaLaunched):
            assert launched.host is not None
            launched.ready.synchronize()
            launched.ended_at = time.perf_counter()
            launched.token_ids = launched.host[: launched.batch.num_sampled].tolist()
            if -1 in launched.token_ids:
                raise EngineError(LOST_PEER)
        return launched.token_ids, launched.logprobs

    def _sample_on_host(self, batch: ScheduledBatch, allowed: Mapping[str, Tensor]) -> Launched:
        """The general sampler on the step's logits. It reads back as it goes; the next step waits for it."""
        self._references = {}
        rows = sampling_rows(batch, allowed)
        token_ids, logprobs = self.sampler.sample(self._on_device.left(len(rows)), rows)
        if self._compute.lost_peer():
            raise EngineError(LOST_PEER)
        return Launched(batch, token_ids, logprobs)

    def _shared_tokens(self, items: list[ScheduledSequence]) -> int:
        """Tokens of the blocks that all of many sequences begin with, if it is worth to read those once for all."""
        if (pool := self._paged.shared_pool) is None:
            return 0
        tokens = self.backend.block_size * shared_blocks([item.sequence.block_tables[pool] for item in items])
        return tokens - tokens % PREFIX_STEP if tokens >= _SHARED_TOKENS else 0

    def _token(self, item: ScheduledSequence) -> int:
        """The newest token of a decode, or where the device finds it: -1 - row of the step before."""
        sequence = item.sequence
        if item.start < len(sequence.token_ids):
            return sequence.token_ids[item.start]
        return -1 - self._references[sequence.id]

    def _decode_rows(self, items: list[ScheduledSequence], slots: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Slot, position and token of each row: a sequence's newest token, and the drafts behind it, each of which is a
        decode of its own. In every layer all keys of a step are written before any row reads them."""
        rows: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        for item, slot in zip(items, slots, strict=True):
            rows += [slot] * item.num_new_tokens
            positions += range(item.start, item.end)
            tokens += [self._token(item), *item.drafts]
        return rows, positions, tokens

    def _mixed_rows(
        self, batch: ScheduledBatch, slots: list[int]
    ) -> tuple[list[int], list[int], list[int], int, list[int], list[int]]:
        decodes = batch.num_decodes
        rows, positions, tokens = self._decode_rows(batch.items[:decodes], slots[:decodes])
        sampled = list(range(decodes))
        for item, slot in zip(batch.items[decodes:], slots[decodes:], strict=True):
            rows += [slot] * item.num_new_tokens
            positions += range(item.start, item.end)
            tokens += item.sequence.token_ids[item.start : item.end]
            if item.samples:
                sampled.append(len(rows) - 1)
        return rows, positions, tokens, decodes, [item.num_new_tokens for item in batch.items[decodes:]], sampled

    def _eager(self, batch: ScheduledBatch, slots: list[int], path: SamplingPath) -> None:
        """A step with prefill chunks, or one that scores, launched kernel by kernel."""
        logits = self.logits(batch, self._forward_batch(batch, slots))
        if not batch.sampled:
            return
        keys = [noise_keys(item.sequence.params.seed, place) for item in batch.sampled for place in item.places]
        at = [slot for slot, item in zip(slots, batch.items, strict=True) for _ in item.places]
        filters = self._slots.tables.filters.rows(self._to_device(np.array(at, dtype=np.int64)))
        self._on_device.sample(logits, filters, self._to_device(np.array(keys, dtype=np.int64)), path)

    def _forward_batch(self, batch: ScheduledBatch, slots: list[int]) -> ForwardBatch:
        items = batch.items
        ids: list[int] = []
        for item in items:
            known = item.token_ids
            ids.extend(known if len(known) == item.num_new_tokens else [self._token(item)])
        lens = np.array([item.num_new_tokens for item in items])
        ends = np.array([item.end for item in items])
        last = np.cumsum(lens)
        starts = last - lens
        positions = np.arange(int(last[-1])) - np.repeat(starts - (ends - lens), lens)
        sampled = np.array([end - 1 - after for end, item in zip(last, items, strict=True) for after in _behind(item)])
        token_slots = np.repeat(np.array(slots), lens)
        offsets = np.repeat(np.array([item.sequence.rope_offset for item in items]), lens)
        packed = self._to_device(np.stack([np.array(ids), positions, token_slots, positions + offsets]))
        ids_T, positions_T, slots_T, rope_T = packed.unbind(0)
        per_sequence = np.stack([np.array(slots), ends, last])
        slots_S, ends_S, last_S = self._to_device(per_sequence).unbind(0)
        block_size = self.backend.block_size
        tables = self._slots.tables.block_tables
        slot_mapping = tables[:, slots_T, positions_T // block_size].long() * block_size + positions_T % block_size
        width = int(-(-ends.max() // block_size))
        starts_S1 = torch.zeros(len(items) + 1, dtype=torch.int32, device=self.group.device)
        starts_S1[1:] = last_S
        return ForwardBatch(
            input_ids=torch.where(ids_T < 0, self._sampled[(-1 - ids_T).clamp(min=0)], ids_T).clamp(min=0),
            rope_positions=rope_T,
            pools=tuple(map(PoolTables, slot_mapping, tables[:, slots_S, :width].contiguous())),
            query_lens=lens.tolist(),
            seq_lens=ends.tolist(),
            num_decodes=batch.num_decodes,
            logits_rows=self._to_device(sampled.astype(np.int64)),
            query_start_S1=starts_S1,
            seq_lens_S=ends_S.int(),
            state_tables=self._states(batch) if self.memory.num_states else None,
        )

    def _states(self, batch: ScheduledBatch) -> StateTables:
        decodes, (rows, made) = batch.num_decodes, StepStates.of(batch)
        numbers = self._to_device(flat([*rows, *made.chunks, *made.sequences]))
        of_rows, of_chunks, of_sequences = torch.split(numbers, [NUMBERS * decodes, *made.sizes])
        chunks = ChunkTables(of_chunks.view(5, -1), of_sequences.view(4, -1), made.groups)
        return StateTables(of_rows.view(NUMBERS, decodes), chunks if batch.num_prefills else None)

    def info(self) -> EngineInfo:
        info = super().info()
        return info if self._compute.peers is None else replace(info, all_reduce="peer memory")

    def _to_device(self, host: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(host).pin_memory().to(self.group.device, non_blocking=True)


def shared_blocks(tables: list[list[int]]) -> int:
    """How many blocks all tables begin with. Only blocks that are full, and computed, are ever shared."""
    if tables[0][0] != tables[-1][0]:  # as it mostly is
        return 0
    least, most = min(tables), max(tables)  # what is between begins with all that these have in common
    for count, (one, other) in enumerate(zip(least, most, strict=False)):
        if one != other:
            return count
    return min(map(len, tables)) - 1


def _behind(item: ScheduledSequence) -> range:
    """How many of an item's rows come after each of those that are sampled."""
    return range(len(item.places) - 1, -1, -1)
