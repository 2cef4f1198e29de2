"""Runs steps on one rank: what every device shares, and the plain way to do it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpctl.engine.guiding.masks import Masks, PendingMasks
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.runners.memory_plan import MemoryPlan
from tpctl.engine.sampling.sampler import SamplingRow
from tpctl.engine.sampling.scores import rows_together, score_rows
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.scheduling.speculation import RowCost, Speculation
from tpctl.engine.steps.batch import build_forward_batch
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.rotary import rotary_offset
from tpctl.layers.stream import Rows
from tpctl.wire.report import EngineInfo, TokenLogprob


@dataclass
class Launched:
    """A step that has been started: its token ids, or (a subclass) where they will be.

    launched_at: by ``time.perf_counter``. ended_at: when the host saw that its tokens were there, where it waited.
    """

    batch: ScheduledBatch
    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    launched_at: float = field(default_factory=time.perf_counter)
    ended_at: float = 0.0


class ModelRunner:
    """One rank's model, KV cache and sampler.

    Attributes:
        pace: how prompts are best computed beside decodes; ``None``: as fast as possible.
        masks: which tokens grammars allow.
        states_apart: as of ``StatePool``.
        speculation: what proposes them, where that is the runner's own.
        row_cost: what these cost here. most_rows: rows of a step that are sampled at most, drafts included; ``None``:
            as many as are computed.
    """

    states_apart = False
    row_cost = RowCost(first=0.08, row=0.045)
    most_rows: int | None = None
    speculation: Speculation | None = None

    def __init__(self, loaded: LoadedModel, memory: MemoryPlan, pace: Pace | None = None) -> None:
        started = time.perf_counter()
        self.loaded = loaded
        self.memory = memory
        self.pace = pace
        self.group = loaded.group
        self.model = loaded.model
        self.backend = loaded.backend
        self.sampler = loaded.sampler
        self.masks = Masks(loaded.group, loaded.config.vocab_size)
        self.kv = loaded.caches(memory.num_blocks, memory.num_states)
        loaded.timings.lap("kv cache", started)

    def rope_offset(self, num_tokens: int) -> int:
        """The first row of the tables that rotate all keys of a sequence of ``num_tokens`` tokens."""
        return rotary_offset(self.loaded.rotaries, num_tokens)

    def launch(self, batch: ScheduledBatch) -> Launched:
        """Start a step. On a CPU it ends before the call does."""
        with torch.inference_mode():
            masks, forward = self.masks.begin(batch), self.forward_batch(batch)
            return self.sampled(batch, self.logits(batch, forward), masks)

    def forward_batch(self, batch: ScheduledBatch) -> ForwardBatch:
        """What the model computes in a step."""
        return build_forward_batch(batch, self.backend.block_size, self.group.device, self.backend.places)

    def sampled(self, batch: ScheduledBatch, logits: Tensor, masks: PendingMasks | None) -> Launched:
        """A step with the tokens that are sampled from its logits [R, V], by masks that were begun with it."""
        if not len(logits):
            return Launched(batch, [])
        token_ids, logprobs = self.sampler.sample(logits, sampling_rows(batch, self.masks.finish(masks)))
        return Launched(batch, token_ids, logprobs)

    def logits(self, batch: ScheduledBatch, forward: ForwardBatch) -> Tensor:
        """[R, V]: this rank's logits of the rows that are sampled; tokens that are to be scored are, on the way."""
        if not batch.scores:
            return self.model(forward, self.kv, forward.logits_rows)  # type: ignore[no-any-return]
        final = self.model.final(forward, self.kv)
        assert final is not None
        return self.chosen(batch, final, forward.logits_rows)

    def chosen(self, batch: ScheduledBatch, final: Rows, rows: Tensor) -> Tensor:
        """As ``logits``, of what the head makes them of, of all tokens of a step."""
        if batch.scores:
            self._score(batch, final)
        head = self.model.lm_head
        if not len(rows):
            return final.x.new_empty(0, head.out_features)
        return head(final.x[rows], final.norm)  # type: ignore[no-any-return]

    def _score(self, batch: ScheduledBatch, final: Rows) -> None:
        """Tell the sequences the scores of their tokens; a few rows of logits at a time, however many there are."""
        head, vocab_size = self.model.lm_head, self.loaded.config.vocab_size
        together, begin = rows_together(self.sampler.widest), 0
        for item in batch.items:
            sequence, places = item.sequence, item.scored
            for at in range(places.start, places.stop, together):
                some = range(at, min(at + together, places.stop))
                row = begin + some.start - 1 - item.start  # that of the token before
                logits = head(final.x[row : row + len(some)], final.norm)
                targets = torch.tensor(sequence.token_ids[some.start : some.stop], device=logits.device)
                if sequence.scoring is not None:
                    scores = score_rows(logits, targets, self.sampler, vocab_size, sequence.scoring, some.start)
                    sequence.scores.update(zip(some, scores, strict=True))
                if (count := sequence.params.prompt_logprobs) is not None:
                    logprobs = self.sampler.logprobs(logits, targets, count)
                    sequence.prompt_logprobs.update(zip(some, logprobs, strict=True))
            begin += item.num_new_tokens

    def collect(self, launched: Launched) -> tuple[list[int], list[TokenLogprob | None] | None]:
        """Wait for a step: the tokens of its batch's ``sampled``, and log-probabilities where any are wanted."""
        return launched.token_ids, launched.logprobs

    def may_overlap(self, batch: ScheduledBatch) -> bool:
        """Whether the next step can be started before this one's tokens are known on the host."""
        return False

    def rest(self) -> bool:
        """Called while there is nothing to do, on every rank: time to get ready for what may come, a piece at a time.
        Whether there is more."""
        return False

    def info(self) -> EngineInfo:
        """What ``Ready`` reports of this rank."""
        loaded, memory, device = self.loaded, self.memory, self.group.device.type
        dtype = str(loaded.dtype).removeprefix("torch.")
        return EngineInfo(
            device=device,
            dtype=dtype,
            tp_size=self.group.size,
            attention_backend=self.backend.name,
            kv_cache_dtype=dtype if self.backend.kv_form == "model" else self.backend.kv_form,
            block_size=self.backend.block_size,
            num_blocks=memory.num_blocks,
            max_model_len=memory.max_model_len,
            wanted_model_len=loaded.wanted_len,
            kv_cache_bytes=memory.num_blocks * loaded.slab_bytes,
            all_reduce="NCCL" if device == "cuda" and self.group.size > 1 else None,
            scheduling_policy="fcfs" if self.pace is None else "makespan",
            weight_bytes=loaded.weight_bytes,
            timings=loaded.timings,
            max_num_seqs=loaded.settings.max_num_seqs,
            expert_parallel=loaded.config.cutting.expert_parallel,
            num_states=memory.num_states,
            vocab_size=loaded.config.vocab_size,
        )

    def device_memory(self) -> int:
        """Bytes of device memory that tensors take, the maximum over the ranks (collective); 0 on a CPU."""
        device = self.group.device
        return self.group.maximum(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0

    def reserved_memory(self) -> int:
        """Bytes of device memory that torch keeps, for tensors, graphs and later ones; else as ``device_memory``."""
        device = self.group.device
        return self.group.maximum(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def sampling_rows(batch: ScheduledBatch, allowed: Mapping[str, Tensor]) -> list[SamplingRow]:
    """What the sampler needs for each token of the batch's ``sampled``; all tokens before must be known.

    allowed: what ``Masks`` found, by sequence, none of which has drafts. It has looked to ``min_tokens`` already.
    """
    rows = []
    for item in batch.sampled:
        sequence, mask = item.sequence, allowed.get(item.sequence.id)
        params, prompt = sequence.params, sequence.num_prompt_tokens
        counts = sequence.counts() if params.penalizes else None
        for number, place in enumerate(item.places):
            early = mask is None and place - prompt < params.min_tokens
            banned = sequence.stop_token_ids if early else ()
            rows.append(SamplingRow(params, place, counts, item.drafts[:number], banned, mask))
    return rows
