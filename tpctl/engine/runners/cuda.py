"""Runs steps on a GPU, one ahead of their results.

A step's sampled tokens stay on the device, where the next step reads them; the host learns them one step later. The
host's work per step is a few integers per row and one copy, so it schedules step N + 1 while step N computes.

Decodes are replayed from CUDA graphs (``engine.cuda_graph``), and so are steps of decodes and a few prompt tokens where
the scheduler makes them (``engine.pacing``); other steps with prefill chunks are launched kernel by kernel.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.engine.runners.runner import Launched, ModelRunner, sampling_rows
from tpctl.engine.sampling.noise import noise_keys
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.steps.graphs import CapturedSteps, DecodeGraphs, MixedGraphs, MixedInputs
from tpctl.engine.steps.slots import Slots
from tpctl.errors import EngineError
from tpctl.kernels.common.launch import has_pdl
from tpctl.kernels.sampling.floors import Filters, sampling_floors
from tpctl.kernels.sampling.prepare import DecodeInputs, prepare_decode
from tpctl.kernels.sampling.sampling import sample
from tpctl.layers.attention.paged import PagedBackend
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.batch import ForwardBatch, PrefillChunks
from tpctl.models.cuda_decoder import PDL_ROWS, CudaDecoder
from tpctl.wire.report import EngineInfo, TokenLogprob
from tpctl.wire.settings import EngineConfig

_LOST_PEER = "a rank waited two minutes for another one, which hangs or was stopped"
# Rows that an H100 multiplies in little more than the time of a few (docs/kernel-notes.md): where a layer has many
# weights reading them takes that long, where it has few the latency of its kernels does.
_PACE, _SMALL_PACE = Pace(rows=256, limit=512, chunks=8), Pace(rows=512, limit=1024, chunks=8)
_SMALL_LAYER = 64 << 20  # bytes of a rank
_MOST_UNPACKED = 8
"""Of a packed KV cache, what a step's prompts read at most unpacked, in steps of the largest size."""
_RING = 3  # result buffers: one being read, one being filled, one to spare


@dataclass
class CudaLaunched(Launched):
    """``ready`` is recorded behind the copy of the token ids into ``host``."""

    host: Tensor | None = None
    ready: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class CudaRunner(ModelRunner):
    """One rank on one GPU, for the backends that read the paged cache in place."""

    def __init__(self, config: EngineConfig, group: TPGroup) -> None:
        super().__init__(config, group)
        rows = self._max_rows
        blocks = -(-self.max_model_len // self.backend.block_size)
        self._max_blocks = blocks
        # More slots than can run: a step may still compute a sequence that has ended, beside its successor.
        self._slots = Slots(2 * config.max_num_seqs, blocks, group.device)
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=group.device)
        self._results = [torch.zeros(rows, dtype=torch.int64).pin_memory() for _ in range(_RING)]
        self._turn = 0
        self._references: dict[str, int] = {}
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        if not config.enforce_eager:
            chunks = 0 if self.pace is None else self.pace.chunks
            steps = CapturedSteps(self._step_bytes, self._sampled, MixedGraphs.most_numbers(rows, chunks), blocks)
            self._graphs = DecodeGraphs(steps, config.max_num_seqs, self._decode_step)
            if self.pace is not None:
                self._mixed = MixedGraphs(steps, self.pace, self._mixed_step)

    @property
    def _cuda_backend(self) -> PagedBackend:
        assert isinstance(self.backend, PagedBackend)
        return self.backend

    @cached_property
    def _logits(self) -> Tensor:
        """[rows, V]: where steps leave the logits that are sampled with the host's help."""
        rows, width = MixedGraphs.most_sampled(self.config.max_num_seqs), self.model.lm_head.weight.shape[0]
        return torch.empty(rows, width, dtype=self.dtype, device=self.group.device)

    def may_overlap(self, batch: ScheduledBatch) -> bool:
        return batch.searches is not None

    def launch(self, batch: ScheduledBatch) -> Launched:
        with torch.inference_mode():
            slots = self._slots.update(batch.items)
            searches = batch.searches
            if batch.num_decodes == len(batch.items) and self._graphs is not None:
                rows = self._decode_rows(batch.items, slots)
                self._graphs.run(*rows, self._cuda_backend.is_long(len(slots), 1 + max(rows[1])), searches)
            elif batch.paced and self._mixed is not None and self._mixed.takes(batch):
                self._mixed.run(*self._mixed_rows(batch, slots), searches)
            else:
                self._eager(batch, slots, searches)
            if searches is None:
                return self._sample_on_host(batch)
            self._references = {item.sequence.id: row for row, item in enumerate(batch.sampled)}
            host = self._results[self._turn]
            self._turn = (self._turn + 1) % _RING
            launched = CudaLaunched(batch, [], host=host)
            count = len(batch.sampled)
            host[:count].copy_(self._sampled[:count], non_blocking=True)
            launched.ready.record()
            return launched

    def collect(self, launched: Launched) -> tuple[list[int], list[TokenLogprob | None] | None]:
        if isinstance(launched, CudaLaunched):
            assert launched.host is not None
            launched.ready.synchronize()
            launched.token_ids = launched.host[: len(launched.batch.sampled)].tolist()
            if -1 in launched.token_ids:
                raise EngineError(_LOST_PEER)
        return launched.token_ids, launched.logprobs

    def _sample_on_host(self, batch: ScheduledBatch) -> Launched:
        """The general sampler on the step's logits. It reads back as it goes; the next step waits for it."""
        self._references = {}
        rows = sampling_rows(batch)
        token_ids, logprobs = self.sampler.sample(self._logits[: len(rows)], rows)
        if self._decoder.lost_peer():
            raise EngineError(_LOST_PEER)
        return Launched(batch, token_ids, logprobs)

    def _token(self, item: ScheduledSequence) -> int:
        """The newest token of a decode, or where the device finds it: -1 - row of the step before."""
        sequence = item.sequence
        if item.start < len(sequence.token_ids):
            return sequence.token_ids[item.start]
        return -1 - self._references[sequence.id]

    def _decode_rows(self, items: list[ScheduledSequence], slots: list[int]) -> tuple[list[int], list[int], list[int]]:
        return slots, [item.start for item in items], [self._token(item) for item in items]

    def _prepared(self, rows: DecodeInputs) -> ForwardBatch:
        """Every row a decode, filled in on the device from what the host has packed."""
        prepare_decode(rows, self._sampled, self._slots.tables, self.backend.block_size)
        return ForwardBatch(
            input_ids=rows.input_ids,
            rope_positions=rows.rope_positions,
            slot_mapping=rows.slot_mapping,
            block_tables=rows.block_tables,
            query_lens=[],
            seq_lens=[],
            num_decodes=rows.input_ids.shape[0],
            logits_rows=rows.input_ids,
            seq_lens_S=rows.seq_lens,
        )

    def _decode_step(self, inputs: DecodeInputs, long: bool, searches: int | None) -> None:
        """One decode step, from the packed rows to ``self._sampled``: what a graph captures."""
        forward = replace(self._prepared(inputs), long_context=long)
        logits = self._decoder.logits(forward, self.kv, None)
        self._sample_into(logits, inputs.filters, inputs.keys, searches)

    def _find_pace(self) -> Pace | None:
        """How prompts are computed beside decodes, where that can be captured; the same on every rank."""
        config = self.config
        if config.scheduling_policy == "fcfs" or config.enforce_eager or not self._cuda_backend.captures_prefill:
            return None
        layer = sum(parameter.nbytes for parameter in self.model.model.layers[0].parameters())
        return _SMALL_PACE if self.group.minimum(layer) < _SMALL_LAYER else _PACE

    @property
    def _max_rows(self) -> int:
        """Rows of the largest step that a graph may hold."""
        return max(self.config.max_num_seqs, 0 if self.pace is None else self.pace.limit)

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

    def _mixed_step(self, inputs: MixedInputs, searches: int | None) -> None:
        """One step of decodes and prefill chunks, from the packed rows to ``self._sampled``: what a graph captures."""
        rows = inputs.rows
        forward = self._prepared(rows)
        decodes = torch.arange(forward.num_decodes, device=self.group.device) < inputs.num_decodes
        picked = inputs.logits_rows.long()
        forward = replace(
            forward,
            logits_rows=picked,
            seq_lens_S=rows.seq_lens * decodes,
            chunks=PrefillChunks(
                rows.block_tables.index_select(0, inputs.last_row_P), inputs.query_start_P1, inputs.seq_lens_P
            ),
        )
        logits = self._decoder.logits(forward, self.kv, picked)
        self._sample_into(logits, rows.filters.rows(picked), rows.keys[picked], searches)

    def _sample_into(self, logits: Tensor, filters: Filters, keys: Tensor, searches: int | None) -> None:
        """Sample into ``self._sampled``, or leave the logits in ``self._logits`` (``searches`` is ``None``)."""
        if searches is None:
            self._logits[: logits.shape[0]].copy_(logits)
            return
        sampler = self.sampler
        pdl = logits.shape[0] <= PDL_ROWS and has_pdl(logits.device)
        floors = None
        if searches:
            whole, vocab_size = sampler.whole_rows(logits)
            floors = sampling_floors(whole, filters, vocab_size=vocab_size, both=searches == 2, pdl=pdl)
        scores, ids = sample(
            logits,
            filters.temperature,
            keys,
            vocab_start=sampler.first,
            vocab_size=self.model_config.vocab_size,
            floors_T=floors,
            pdl=pdl,
        )
        winner = self._decoder.winner(scores, ids)
        self._sampled[: logits.shape[0]].copy_(sampler.agree(scores, ids) if winner is None else winner)

    def _eager(self, batch: ScheduledBatch, slots: list[int], searches: int | None) -> None:
        """A step with prefill chunks, launched kernel by kernel."""
        forward = self._forward_batch(batch, slots)
        logits = self._decoder.logits(forward, self.kv, forward.logits_rows)
        if not batch.sampled:
            return
        keys = [noise_keys(item.sequence.params.seed, item.end) for item in batch.sampled]
        at = [slots[row] for row, item in enumerate(batch.items) if item.samples]
        filters = self._slots.tables.filters.rows(self._to_device(np.array(at, dtype=np.int64)))
        self._sample_into(logits, filters, self._to_device(np.array(keys, dtype=np.int64)), searches)

    def _forward_batch(self, batch: ScheduledBatch, slots: list[int]) -> ForwardBatch:
        items = batch.items
        ids: list[int] = []
        for item in items:
            known = item.sequence.token_ids[item.start : item.end]
            ids.extend(known if len(known) == item.num_new_tokens else [self._token(item)])
        lens = np.array([item.num_new_tokens for item in items])
        ends = np.array([item.end for item in items])
        last = np.cumsum(lens)
        starts = last - lens
        positions = np.arange(int(last[-1])) - np.repeat(starts - (ends - lens), lens)
        sampled = last[[row for row, item in enumerate(items) if item.samples]] - 1
        token_slots = np.repeat(np.array(slots), lens)
        offsets = np.repeat(np.array([item.sequence.rope_offset for item in items]), lens)
        packed = self._to_device(np.stack([np.array(ids), positions, token_slots, positions + offsets]))
        ids_T, positions_T, slots_T, rope_T = packed.unbind(0)
        per_sequence = np.stack([np.array(slots), ends, last])
        slots_S, ends_S, last_S = self._to_device(per_sequence).unbind(0)
        block_size = self.backend.block_size
        tables = self._slots.tables.block_tables
        blocks_T = tables[slots_T, positions_T // block_size].long()
        width = int(-(-ends.max() // block_size))
        starts_S1 = torch.zeros(len(items) + 1, dtype=torch.int32, device=self.group.device)
        starts_S1[1:] = last_S
        return ForwardBatch(
            input_ids=torch.where(ids_T < 0, self._sampled[(-1 - ids_T).clamp(min=0)], ids_T).clamp(min=0),
            rope_positions=rope_T,
            slot_mapping=blocks_T * block_size + positions_T % block_size,
            block_tables=tables[slots_S, :width].contiguous(),
            query_lens=lens.tolist(),
            seq_lens=ends.tolist(),
            num_decodes=batch.num_decodes,
            logits_rows=self._to_device(sampled.astype(np.int64)),
            query_start_S1=starts_S1,
            seq_lens_S=ends_S.int(),
        )

    def info(self) -> EngineInfo:
        info = super().info()
        return info if self._decoder.peers is None else replace(info, all_reduce="peer memory")

    def _to_device(self, host: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(host).pin_memory().to(self.group.device, non_blocking=True)

    def _warm_up(self) -> None:
        """Connect NCCL and create cuBLAS' handle and workspace, which take seconds together."""
        device = self.group.device
        with torch.cuda.device(device), torch.inference_mode():
            square = torch.zeros(16, 16, dtype=self.dtype, device=device)
            product = self.group.all_reduce(square @ square)
            torch.cuda.current_stream().synchronize()
            del product  # not before: its memory could become a weight's, which other streams fill meanwhile

    def _kv_budget(self) -> int:
        """What is left of the GPU's share beside weights, the largest step's activations, found by running one, and
        what captured steps will hold."""
        config, device = self.config, self.group.device
        self.pace = self._find_pace()
        rows, tokens = self._max_rows, config.max_num_batched_tokens
        self._decoder = CudaDecoder(self.model, self._cuda_backend, rows, tokens)
        if isinstance(self.backend, TritonBackend):
            self.backend.keep_unpacked(min(_MOST_UNPACKED * tokens, tokens + self.max_model_len), tokens, device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        self._dummy_step()
        torch.cuda.synchronize(device)
        self._lap("largest step", started)
        activations = torch.cuda.max_memory_allocated(device) - before
        sampled = MixedGraphs.most_sampled(config.max_num_seqs)
        logits = sampled * self.model.lm_head.weight.shape[0] * self.dtype.itemsize
        whole = 0 if self.group.size == 1 else (1 + self.group.size) * logits  # gathered where top-k or top-p is set
        # Of a step of other size; at most, since logits are counted twice.
        self._step_bytes = -(-activations * rows // tokens) + logits + whole
        later = self._bytes_of_tables() + (whole if config.enforce_eager else self._step_bytes)
        later += logits + self.sampler.working_bytes(config.max_num_seqs)  # sampling with the host's help
        self._later_bytes = later
        if config.kv_cache_memory is not None:
            return config.kv_cache_memory
        share = self._gpu_share
        assert share is not None
        taken = share.taken(device)
        budget = share.nbytes - taken - later - self._reserve
        if budget <= 0:
            raise EngineError(
                f"nothing is left for the KV cache: of its GPU's {share.total / 2**30:.1f} GiB rank {self.group.rank} "
                f"may take {share.nbytes / 2**30:.1f} (--gpu-memory-utilization {share.utilization}), but takes "
                f"{taken / 2**30:.1f} with {before / 2**30:.1f} of weights and {activations / 2**30:.1f} of "
                f"activations, and {(later + self._reserve) / 2**30:.1f} for CUDA graphs and sampling; raise it, or "
                f"lower --max-num-batched-tokens or --max-num-seqs"
            )
        return budget

    def _room_for_cache(self) -> int:
        return super()._room_for_cache() - self._later_bytes

    def _bytes_of_tables(self) -> int:
        """Block tables on the device: every slot's, and those of a captured step."""
        rows = 2 * self.config.max_num_seqs + (0 if self.config.enforce_eager else self._max_rows)
        return 4 * rows * -(-self.max_model_len // self.backend.block_size)

    def _dummy_step(self) -> None:
        """The largest step: a prefill of the whole token budget, sampled at as many rows as can run."""
        tokens, device = self.config.max_num_batched_tokens, self.group.device
        length = min(tokens, self.max_model_len)
        lens = [length] * (tokens // length)
        if tokens % length:
            lens.append(tokens % length)
        block_size = self.backend.block_size
        (kv,) = self.backend.allocate(1, 1, self.dtype, device)
        ends = torch.tensor([0, *np.cumsum(lens).tolist()], dtype=torch.int32, device=device)
        forward = ForwardBatch(
            input_ids=torch.zeros(sum(lens), dtype=torch.int64, device=device),
            rope_positions=torch.zeros(sum(lens), dtype=torch.int64, device=device),
            slot_mapping=torch.full((sum(lens),), -1, dtype=torch.int64, device=device),
            block_tables=torch.zeros(len(lens), -(-length // block_size), dtype=torch.int32, device=device),
            query_lens=lens,
            seq_lens=lens,
            num_decodes=0,
            logits_rows=torch.zeros(min(self.config.max_num_seqs, tokens), dtype=torch.int64, device=device),
            query_start_S1=ends,
            seq_lens_S=torch.tensor(lens, dtype=torch.int32, device=device),
        )
        with torch.inference_mode():
            self._decoder.logits(forward, [kv] * self.model_config.num_layers, forward.logits_rows)
