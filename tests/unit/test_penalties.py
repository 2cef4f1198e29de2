"""Penalties equal a loop over the whole history, and cost what is new."""

from __future__ import annotations

import random
from collections import Counter
from typing import ClassVar

import pytest
import torch

from tpctl.engine.sampling.penalties import penalize
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.token_counts import TokenCounts
from tpctl.partition.cuts import Vocab
from tpctl.wire.sampling import SamplingParams

VOCAB = 300
WAYS = [
    SamplingParams(repetition_penalty=1.05),
    SamplingParams(repetition_penalty=0.7, frequency_penalty=0.1),
    SamplingParams(frequency_penalty=-0.3),
    SamplingParams(presence_penalty=1.7),
    SamplingParams(repetition_penalty=1.3, presence_penalty=-0.7, frequency_penalty=0.3),
]


def penalized(row: torch.Tensor, params: SamplingParams, history: list[int], num_prompt_tokens: int) -> torch.Tensor:
    """By the definition, a token at a time; each operation rounded to float32, as logits are."""
    changed = row.clone()
    counts = Counter(history[num_prompt_tokens:])
    factor = torch.tensor(params.repetition_penalty, dtype=torch.float32)
    for token in set(history):
        if params.repetition_penalty != 1.0:
            changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        if count := counts[token]:
            minus = params.frequency_penalty * count + params.presence_penalty
            changed[token] -= torch.tensor(minus, dtype=torch.float32)
    return changed


@pytest.mark.parametrize("tp_size", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_logits_are_those_of_a_loop_over_the_history(seed: int, tp_size: int) -> None:
    """Step after step, with drafts of which some hold, of prompts long, short and none, in every rank's part."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    params = [chance.choice(WAYS) for _ in range(9)]
    histories = [chance.choices(range(VOCAB), k=chance.choice([1, 5, 200])) for _ in params]
    prompts = [chance.choice([0, len(history) // 2, len(history)]) for history in histories]
    counts = [TokenCounts(prompt) for prompt in prompts]
    slices = Vocab().ranges(VOCAB, tp_size)
    for _ in range(6):
        drafts = [chance.choices([*history[-3:], 7, 299], k=chance.randrange(4)) for history in histories]
        logits = torch.randn(len(params), slices[-1].stop) * 3
        logits[0, :50], logits[1, 9] = float("-inf"), float("nan")
        wanted = torch.stack(
            [
                penalized(*one)
                for one in zip(
                    logits, params, [a + b for a, b in zip(histories, drafts, strict=True)], prompts, strict=True
                )
            ]
        )
        counted = {
            row: counts[row].follow(histories[row]).with_drafts(drafts[row]) for row in reversed(range(len(params)))
        }
        for held in slices:
            real = len(held.clipped(VOCAB))
            own = logits[:, held.start : held.start + max(real, 1)].clone()
            penalize(own, params, counted, held.start, real)
            torch.testing.assert_close(
                own[:, :real], wanted[:, held.start : held.start + real], rtol=0, atol=0, equal_nan=True
            )
        for history, drafted in zip(histories, drafts, strict=True):
            history += [*drafted[: chance.randrange(3)], chance.randrange(VOCAB)]


def test_a_step_looks_at_the_tokens_that_came_since_the_last() -> None:
    class Read(list[int]):
        """Notes which of its tokens are looked at."""

        places: ClassVar[list[int]] = []

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            self.places += [key] if isinstance(key, int) else range(len(self))[key]
            return super().__getitem__(key)

        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("all of it is looked at")

    sequence = Sequence("a", [3, 4, 4], SamplingParams(frequency_penalty=1.0), 50)
    sequence.token_ids = Read([3, 4, 4])
    assert list(sequence.counts().with_drafts([]).seen) == [3, 4]
    for token in (4, 9, 9):
        sequence.token_ids.append(token)
        Read.places.clear()
        counts = sequence.counts()
        assert Read.places == [len(sequence.token_ids) - 1]
    drafted = counts.with_drafts([9, 3, 5, 5])
    assert [list(one) for one in drafted] == [[3, 4, 9, 5], [4, 9, 3, 5], [1, 3, 1, 2]]
    assert [list(one) for one in counts.with_drafts([])] == [[3, 4, 9], [4, 9], [1, 2]]
