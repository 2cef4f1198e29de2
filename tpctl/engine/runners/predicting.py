"""Steps of a model whose predictor drafts tokens (``arch.predictor``, ``models.predictor``), in plain torch.

Once a step has sampled its tokens, the predictor is given the last state of each token that is certain, and the token
behind it: the prompt's next one, or the one that was sampled. That leaves its keys and values beside those of the
layers, in a cache of its own with the same slots, whatever a step computes: parts of prompts, tokens, drafts that held.

What it makes of a sequence's last token is the first draft. With that, and with what it has made in place of a state,
it makes the next, and so on; what it keeps on the way is written over when the model has computed those tokens. For
these slots the scheduler takes blocks ahead where some are free (``Speculation.ahead``); without one, less is drafted.

A draft is chosen as the token is with which it will be compared: by the request's own filters, penalties and noise, of
the predictor's logits in place of the model's. So it holds oftener than if the likeliest token were drafted.

A prefix that is found in the cache has the predictor's keys, too. That of its last token was made with the token that
followed there: where another one follows, that key is of the other text. A draft may be worse for it; no answer is.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.runners.memory_plan import MemoryPlan
from tpctl.engine.runners.row_cost import predicted_cost
from tpctl.engine.runners.runner import Launched, ModelRunner
from tpctl.engine.sampling.sampler import SamplingRow
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.speculation import PREDICTED, PredictedDrafter, Speculation, verified
from tpctl.engine.steps.batch import Run, build_runs


@dataclass
class _Drafted:
    """A sequence that tokens are drafted for, behind the first ``length``; ``known``: all of these."""

    item: ScheduledSequence
    known: list[int]
    wanted: int
    drafts: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.known)

    @property
    def goes_on(self) -> bool:
        """Whether one more is to be drafted, and there is a slot for what the predictor keeps of the last."""
        slot = self.length - 2 + len(self.drafts)
        return len(self.drafts) < self.wanted and slot < self.item.sequence.num_slots


class PredictingRunner(ModelRunner):
    """As ``ModelRunner``, with a predictor.

    Attributes:
        speculation: what its drafts are proposed by.
    """

    def __init__(self, loaded: LoadedModel, memory: MemoryPlan, pace: Pace | None = None) -> None:
        super().__init__(loaded, memory, pace)
        self.row_cost = predicted_cost(self.row_cost, loaded.config.blueprint)
        self._drafter = PredictedDrafter()
        self.speculation: Speculation = Speculation(self._drafter, self.row_cost, self.most_rows, PREDICTED)
        self._predictor_kv = loaded.predictor_cache(memory.num_blocks)

    def launch(self, batch: ScheduledBatch) -> Launched:
        with torch.inference_mode():
            masks, forward = self.masks.begin(batch), self.forward_batch(batch)
            final = self.model.final(forward, self.kv)
            assert final is not None and final.norm is None, "states are normed once"
            launched = self.sampled(batch, self.chosen(batch, final, forward.logits_rows), masks)
            self._predict(batch, launched.token_ids, final.x)
            return launched

    def _predict(self, batch: ScheduledBatch, sampled: SequenceType[int], states_TH: Tensor) -> None:
        """Let the predictor see the states that a step has computed, and the tokens, and draft."""
        assert self.model.predicting is not None
        self.model.predicting.forget()
        runs: list[tuple[Run, int, list[int], _Drafted | None]] = []
        begin = end = 0
        for item in batch.items:
            row, end = end, end + len(item.places)
            following, drafted = self._following(item, sampled[row:end], len(batch.items))
            if following:
                runs.append((Run(item.sequence, item.start, len(following)), begin, following, drafted))
            begin += item.num_new_tokens
        if not runs:
            return
        runs.sort(key=lambda one: one[0].num_tokens > 1)
        rows = [at for run, first, *_ in runs for at in range(first, first + run.num_tokens)]
        following = [token for *_, tokens, _ in runs for token in tokens]
        ends, behind = [], 0
        for run, *_, drafted in runs:
            behind += run.num_tokens
            if drafted is not None:
                ends.append(behind - 1)
        made = self._made([run for run, *_ in runs], following, states_TH[torch.tensor(rows)], ends)
        self._draft([drafted for *_, drafted in runs if drafted is not None], made)

    def _following(
        self, item: ScheduledSequence, sampled: SequenceType[int], rows: int
    ) -> tuple[list[int], _Drafted | None]:
        """The tokens behind those that are computed for certain, and what is to be drafted behind them."""
        sequence = item.sequence
        if not item.samples:
            return sequence.token_ids[item.start + 1 : item.end + 1], None
        came = list(verified(item.drafts, sampled))
        if came[-1] < 0:  # no token could be chosen
            return [*sequence.token_ids, *came[:-1]][item.start + 1 :], None
        known = [*sequence.token_ids, *came]
        most = sequence.max_num_tokens - len(known) - 1
        wanted = 0 if sequence.params.guide else min(most, self.speculation.wanted(sequence, len(known), rows))
        drafted = _Drafted(item, known, wanted)
        return known[item.start + 1 :], drafted if drafted.goes_on else None

    def _made(
        self, runs: SequenceType[Run], following: list[int], states_TH: Tensor, rows: SequenceType[int] | None = None
    ) -> Tensor:
        """What the predictor makes of the states of ``runs`` and the tokens behind them; ``None``: of all."""
        batch = build_runs(runs, following, self.backend.block_size, self.group.device, self.backend.places)
        if rows is None or len(rows) == batch.num_tokens:
            return self.model.predict(states_TH, batch, self._predictor_kv)
        return self.model.predict(states_TH, batch, self._predictor_kv, torch.tensor(rows, dtype=torch.int64))

    def _draft(self, drafted: list[_Drafted], made_RH: Tensor) -> None:
        """Draft token after token, of all sequences at once, and keep them for the next step."""
        going = drafted
        while going:
            tokens, _ = self.sampler.sample(self.model.lm_head(made_RH), [_row(one) for one in going])
            for one, token in zip(going, tokens, strict=True):
                if token < 0:
                    one.wanted = 0
                else:
                    one.drafts.append(token)
            rows = [row for row, one in enumerate(going) if one.goes_on]
            going = [going[row] for row in rows]
            if going:
                runs = [Run(one.item.sequence, one.length - 2 + len(one.drafts), 1) for one in going]
                made_RH = self._made(runs, [one.drafts[-1] for one in going], made_RH[torch.tensor(rows)])
        for one in drafted:
            self._drafter.keep(one.item.sequence, one.length, one.drafts)


def _row(one: _Drafted) -> SamplingRow:
    """What the sampler needs for the next draft: as for the token at its place, but for log-probabilities."""
    sequence, place = one.item.sequence, one.length + len(one.drafts)
    params, prompt = sequence.params, sequence.num_prompt_tokens
    counts = sequence.counts() if params.penalizes else None
    behind = [*one.known[len(sequence.token_ids) :], *one.drafts]  # what the step has sampled is not the sequence's yet
    banned = sequence.stop_token_ids if place - prompt < params.min_tokens else ()
    plain = params if params.logprobs is None else replace(params, logprobs=None)
    return SamplingRow(plain, place, counts, behind, banned)
