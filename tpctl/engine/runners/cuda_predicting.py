"""Steps on a GPU of a model whose predictor drafts tokens (``arch.predictor``), as ``predicting`` has them on a CPU.

All of a step is launched at once: the step, the predictor's pass over its rows, and the drafts, each of which reads on
the device what the one before has left (``predictor_steps``). What drafts depend on, how many of those before held, is
found there, too, so that the host waits once a step: for its tokens, which it tells and schedules by while the drafts
are being made, and then for these. The next step needs both on the host, since how many rows it has, where they are and
which blocks they take hang on them. Where nothing is worth drafting steps overlap as they do without a predictor, whose
pass then leaves keys and values alone.

What requests want that only the host can do (penalties, biases, grammars) it does for their tokens and not for drafts,
which may hold less often for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpctl.engine.runners.cuda import LOST_PEER, CudaRunner
from tpctl.engine.runners.cuda_memory import StepMemory
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.runners.memory_plan import MemoryPlan
from tpctl.engine.runners.predictor_steps import PredictorSteps, StatefulSteps
from tpctl.engine.runners.runner import Launched
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.ngram import Match
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import MOST_PREDICTED, PREDICTED, PredictedDrafter, Speculation, verified
from tpctl.engine.steps.predicting import PredictorGraphs
from tpctl.errors import EngineError
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.layers.stream import Rows


class _Behind(NamedTuple):
    """``drafts`` of each sequence of a step, on their way."""

    step: Launched
    drafts: int


class _AwaitedDrafter(PredictedDrafter):
    """Proposes what is there once ``arrive`` has been called."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        super().__init__()
        self._arrive = arrive

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        self._arrive()
        return super().propose(sequence, most)


class CudaPredictingRunner(CudaRunner):
    """As ``CudaRunner``, with a predictor.

    Attributes:
        speculation: what its drafts are proposed by.
    """

    steps_kind = StatefulSteps

    def __init__(
        self, loaded: LoadedModel, memory: MemoryPlan, compute: CudaCompute, steps: StepMemory, pace: Pace | None
    ) -> None:
        super().__init__(loaded, memory, compute, steps, pace)
        rows = loaded.settings.max_num_seqs
        assert isinstance(self._on_device, StatefulSteps)
        self._predictor = PredictorSteps(
            loaded, memory.num_blocks, compute, self._slots.tables, self._on_device, self._sampled, rows
        )
        self._passes: PredictorGraphs | None = None
        if self._keyed is not None and self._graphs is not None:
            predictor = self._predictor
            self._passes = PredictorGraphs(self._keyed, self._graphs.sizes, predictor.follow_decode, predictor.draft)
        self._drafter = _AwaitedDrafter(self._arrive)
        self.speculation: Speculation = Speculation(
            self._drafter, self.row_cost, self.most_rows, PREDICTED, together=True
        )
        self._computed: tuple[ForwardBatch, Tensor] | None = None  # where a step was launched kernel by kernel
        self._drafts = torch.zeros(MOST_PREDICTED, rows, dtype=torch.int64).pin_memory()
        self._drafted = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._behind: _Behind | None = None
        self._drafting = False

    def may_overlap(self, batch: ScheduledBatch) -> bool:
        return not self._drafting and super().may_overlap(batch)

    def launch(self, batch: ScheduledBatch) -> Launched:
        self._computed = None
        if self._mixed is not None:
            self._mixed.last = None
        launched = super().launch(batch)
        with torch.inference_mode():
            if launched.token_ids:  # which the host has sampled
                self._sampled[: batch.num_sampled].copy_(self._to_device(np.array(launched.token_ids)))
            count = max((self._wanted(item, len(batch.items)) for item in batch.sampled), default=0)
            self._follow(batch, count > 0)
            self._drafting = count > 0
            if count:
                self._draft(launched, count)
        return launched

    def logits(self, batch: ScheduledBatch, forward: ForwardBatch) -> Tensor:
        final = self.model.final(forward, self.kv)
        assert final is not None
        states_TH = self._compute.normed(*final)
        self._computed = forward, states_TH
        return self.chosen(batch, Rows(states_TH), forward.logits_rows)

    def _wanted(self, item: ScheduledSequence, rows: int) -> int:
        """How many tokens to draft for a sequence, if none of its drafts holds."""
        sequence, known = item.sequence, item.places.start + 1
        most = sequence.max_num_tokens - known - 1
        return 0 if sequence.params.guide else max(0, min(most, self.speculation.wanted(sequence, known, rows)))

    def _long(self, batch: ScheduledBatch, rows: int, more: int = 0) -> bool:
        return self._paged.is_long(rows, more + max(item.end for item in batch.items))

    def _follow(self, batch: ScheduledBatch, drafts: bool) -> None:
        """The predictor's pass over a step, for drafts or for keys and values alone."""
        if self._mixed is not None and self._mixed.last is not None:
            self._computed = self._predictor.steps.kept_mixed(self._mixed.last)
        if self._computed is None:
            assert self._passes is not None
            rows = batch.num_tokens
            self._passes.follow(rows, self._long(batch, rows), drafts)
            return
        forward, states_TH = self._computed
        ids_T = self._to_device(np.array(_following(batch, len(states_TH)), dtype=np.int64))
        following_T = torch.where(ids_T < 0, self._sampled[(-1 - ids_T).clamp(min=0)], ids_T)
        rows_R = forward.logits_rows[: batch.num_sampled if drafts else 0]
        self._predictor.follow(forward, states_TH, following_T, rows_R)

    def _draft(self, launched: Launched, count: int) -> None:
        """Have ``count`` tokens drafted for each sequence that has sampled, and sent to the host."""
        batch, path = launched.batch, SamplingPath.of(launched.batch)
        path = SamplingPath.TWO_FLOORS if path is SamplingPath.HOST else path
        columns = _columns(batch.sampled, self._slots.update(batch.sampled))
        sequences = len(batch.sampled)
        long = self._long(batch, sequences, count)
        if self._passes is None:
            self._predictor.draft(self._to_device(np.array(columns, dtype=np.int32)), count, long, path)
        else:
            self._passes.draft(columns, count, long, path)
        for host, device in zip(self._drafts[:count], self._predictor.drafts, strict=False):
            host[:sequences].copy_(device[:sequences], non_blocking=True)
        self._drafted.record()
        self._behind = _Behind(launched, count)

    def _arrive(self) -> None:
        """Wait for drafts that are on their way, and keep them behind the tokens that have come since."""
        if self._behind is None:
            return
        (step, count), self._behind = self._behind, None
        self._drafted.synchronize()
        items, row = step.batch.sampled, 0
        drafts = self._drafts[:count, : len(items)].t().tolist()
        if any(-1 in own for own in drafts):
            raise EngineError(LOST_PEER)
        for item, own in zip(items, drafts, strict=True):
            sequence, came = item.sequence, verified(item.drafts, step.token_ids[row : row + len(item.places)])
            row += len(item.places)
            length = item.places.start + len(came)
            if came[-1] < 0 or sequence.finished or length != len(sequence.token_ids):
                continue
            fit = min(sequence.max_num_tokens - 1 - length, _limit(sequence) + 2 - length)
            self._drafter.keep(sequence, length, _chosen(own[: max(0, fit)]))


def _limit(sequence: Sequence) -> int:
    """Where what is kept of a sequence ends."""
    return min(sequence.num_slots, sequence.max_num_tokens)


def _columns(items: list[ScheduledSequence], slots: list[int]) -> list[list[int]]:
    """What ``accept`` is told of each sequence, in columns."""
    first, rows = 0, []
    for item, slot in zip(items, slots, strict=True):
        drafts = [*item.drafts, *[-1] * (MOST_PREDICTED - len(item.drafts))]
        rows.append((slot, item.places.start - 1, first, _limit(item.sequence), *drafts))
        first += len(item.places)
    return [list(column) for column in zip(*rows, strict=True)]


def _following(batch: ScheduledBatch, rows: int) -> list[int]:
    """The token behind each of a step's, or -1 - row of those that it samples; 0 behind those, of so many ``rows``."""
    ids: list[int] = []
    sampled = 0
    for item in batch.items:
        known = item.sequence.token_ids[item.start + 1 : item.end + 1 - len(item.places)]
        ids += [*known, *range(-1 - sampled, -1 - sampled - len(item.places), -1)]
        sampled += len(item.places)
    return ids + [0] * (rows - len(ids))


def _chosen(tokens: list[int]) -> list[int]:
    """As many as could be chosen."""
    broken = next((place for place, token in enumerate(tokens) if token < 0), len(tokens))
    return tokens[:broken]
