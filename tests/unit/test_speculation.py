"""Speculation: what is proposed, how much of it is computed, and that the answers stay what they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.scheduling import DRAWN, alone, drive, drive_at_random, make
from tpctl.accounting import KvLayout
from tpctl.engine.scheduling.ngram import MOST_COMPARED, Match, NgramIndex
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.scheduling.scheduler import Scheduler
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import (
    MOST_DRAFTS,
    MOST_PREDICTED,
    PREDICTED,
    PredictedDrafter,
    RowCost,
    Speculation,
    best_count,
    verified,
)
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import TokenLogprob
from tpctl.wire.sampling import SamplingParams

FREE = RowCost(0.0, 0.0)
"""Rows that cost nothing, so that all that is proposed is computed."""


class Guess:
    """Knows the answer, and is wrong about some of its tokens."""

    def __init__(self, answer: Callable[[Sequence], list[int]], wrong: Callable[[], bool]) -> None:
        self._answer, self._wrong = answer, wrong
        self.forgotten: list[str] = []

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        coming = self._answer(sequence)[len(sequence.token_ids) - sequence.num_prompt_tokens :][:most]
        return Match([token + 1 if self._wrong() else token for token in coming], MOST_COMPARED) if coming else None

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.id)


def whole(sequence: Sequence) -> list[int]:
    """The answer and more of it than is asked for."""
    return alone(sequence.token_ids[: sequence.num_prompt_tokens], SamplingParams(max_tokens=40, ignore_eos=True), 99)


@settings(max_examples=25, deadline=None)
@given(**DRAWN, apart=st.booleans())
def test_answers_are_those_without(
    seed: int,
    num_blocks: int,
    budget: int,
    abort: bool,
    border: int,
    broken: bool,
    states: int,
    layout: KvLayout,
    apart: bool,
) -> None:
    rng = random.Random(seed)
    guess = Guess(whole, lambda: rng.random() < 0.2)
    speculation = Speculation(guess, FREE)
    scheduler = make(num_blocks, budget=budget, states=states, layout=layout, speculation=speculation, apart=apart)
    scheduler.rope_offset = scheduler.drafting.rope_offset = lambda num_tokens: 64 if num_tokens > border else 0
    requests, found = drive_at_random(scheduler, rng, overlap=False, abort=abort, broken=broken)
    assert sorted(guess.forgotten) == sorted(request.id for request in requests)
    assert scheduler.stats.generated_tokens == sum(map(len, found.values()))
    assert 0 <= speculation.accepted <= speculation.drafted


def steps(scheduler: Scheduler, request: Request, wrong: Callable[[ScheduledBatch], bool] = lambda batch: False) -> int:
    drive(scheduler, [request], False, {})
    return scheduler.stats.steps


def test_right_drafts_take_fewer_steps_and_wrong_ones_no_more() -> None:
    request = Request("0", [3, 4, 5], SamplingParams(max_tokens=40, ignore_eos=True))
    right = Speculation(Guess(whole, lambda: False), FREE)
    assert steps(make(40, speculation=right), request) == 1 + 39 // (MOST_DRAFTS + 1)
    assert right.accepted == right.drafted == 40 - 1 - 39 // (MOST_DRAFTS + 1)
    wrong = Speculation(Guess(whole, lambda: True), FREE)
    assert steps(make(40, speculation=wrong), request) == 40
    assert wrong.accepted == 0 < wrong.drafted


def test_it_drafts_no_more_where_little_holds_and_again_once_it_would() -> None:
    right = False
    speculation = Speculation(Guess(whole, lambda: not right), RowCost(0.2, 0.1))
    sequence = Sequence("0", [3, 4, 5], SamplingParams(), 1000)
    answer = whole(sequence)
    counts = []
    for step in range(40):
        right = step >= 25
        drafts = speculation.propose(sequence, 10, 1)
        counts.append(len(drafts))
        at = len(sequence.token_ids) - 3
        came = verified(drafts, answer[at : at + len(drafts) + 1])
        speculation.learn(sequence, drafts, came)
        sequence.token_ids.append(came[0])
    assert counts[0] > 0 and not any(counts[15:26]) and counts[38] > 0


def test_the_count_that_gives_the_most_tokens_for_its_time() -> None:
    def by_hand(chances: list[float], cost: RowCost, rows: int) -> int:
        rates = [1.0]
        for count in range(1, len(chances) + 1):
            tokens = rows + sum(prod(chances[:taken]) for taken in range(1, count + 1))
            tokens /= rows
            rates.append(tokens / (cost.time(rows + count, True) / cost.time(rows, False)))
        return rates.index(max(rates))

    rng = random.Random(1)
    for _ in range(200):
        chances = [rng.random() for _ in range(rng.randrange(9))]
        cost, rows = RowCost(rng.random() / 2, rng.random() / 4), rng.randint(1, 8)
        assert best_count(chances, cost, rows, 99) == by_hand(chances, cost, rows)
    assert best_count([1.0] * 5, RowCost(0.1, 0.1), 1, 3) == 3
    assert best_count([1.0] * 5, RowCost(0.1, 0.1), 1, 0) == 0


def test_a_predictor_drafts_as_many_as_hold() -> None:
    drafter = PredictedDrafter()
    speculation = Speculation(drafter, RowCost(0.08, 0.045, 0.1), shares=PREDICTED)
    assert (speculation.kind, speculation.ahead) == ("mtp", MOST_PREDICTED - 1)
    sequence = Sequence("0", [3, 4, 5], SamplingParams(), 1000)
    answer, counts = list(range(100, 900)), []
    for step in range(200):
        held = 4 if step < 30 else 0 if step < 80 else 2
        length = len(sequence.token_ids)
        coming = answer[length - 3 : length - 3 + MOST_PREDICTED]
        wanted = speculation.wanted(sequence, length, 1)
        drafter.keep(sequence, length, [token + (place >= held) for place, token in enumerate(coming)][:wanted])
        drafts = speculation.propose(sequence, 10, 1)
        assert len(drafts) <= wanted and speculation.propose(sequence, 1, 1) == drafts[:1]
        came = verified(drafts, answer[length - 3 : length - 3 + len(drafts) + 1])
        speculation.learn(sequence, drafts, came)
        sequence.token_ids += came
        counts.append(len(drafts))
        assert drafter.propose(sequence, 4) is None  # those behind the last token are not known yet
    assert counts[20:30] == [4] * 10
    assert set(counts[60:80]) == {0}  # those that are drafted now and then are compared all the same
    assert set(counts[180:]) == {2}
    speculation.forget(sequence)
    drafter.keep(sequence, len(sequence.token_ids), [])
    assert drafter.propose(sequence, 4) is None


def test_what_a_step_takes_once_is_shared() -> None:
    """Of many sequences, where all draft together: what is worth it for one is worth it for eight, unless rows cost."""
    cost, sequence = RowCost(0.2, 0.01, 0.07), Sequence("0", [3, 4, 5], SamplingParams(), 1000)
    each, all_ = (Speculation(PredictedDrafter(), cost, shares=PREDICTED, together=way) for way in (False, True))
    assert each.wanted(sequence, 3, 1) == all_.wanted(sequence, 3, 1) == 3
    assert (each.wanted(sequence, 3, 8), all_.wanted(sequence, 3, 8)) == (0, 3)
    dear = Speculation(PredictedDrafter(), cost._replace(row=1.0), shares=PREDICTED, together=True)
    assert [dear.wanted(sequence, 3, rows) for rows in (1, 8)] == [1, 0]


def test_a_predictor_that_never_holds_is_asked_now_and_then() -> None:
    speculation = Speculation(PredictedDrafter(), RowCost(0.08, 0.045, 0.1), shares=[0.0] * 9)
    sequence = Sequence("0", [3, 4, 5], SamplingParams(), 1000)
    assert [speculation.wanted(sequence, length, 1) for length in range(8, 25)] == [1, *[0] * 7] * 2 + [1]


def test_slots_are_taken_ahead_where_some_are_free() -> None:
    """For what a predictor keeps of its drafts; nobody gives up blocks for that."""
    for blocks, slots in ((40, 12), (2, 8)):
        scheduler = make(blocks, speculation=Speculation(PredictedDrafter(), FREE, shares=PREDICTED))
        scheduler.add(Request("0", [3, 4, 5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True)))
        for _ in range(2):
            batch = scheduler.schedule()
            assert batch is not None
            sequence = batch.items[0].sequence
            scheduler.commit(batch, [9])
        assert (sequence.num_computed_tokens, sequence.num_slots) == (6, slots)
        scheduler.check_integrity()


def test_guesses_take_no_block_that_another_sequence_comes_to_need() -> None:
    """The older one could have blocks for its guesses all along, and the younger would give up its own for that."""
    scheduler = make(3, speculation=Speculation(PredictedDrafter(), FREE, shares=PREDICTED))
    for index, (length, most) in enumerate(((1, 9), (3, 3))):
        scheduler.add(Request(str(index), [3 + index] * length, SamplingParams(max_tokens=most, ignore_eos=True)))
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch, [9] * len(list(batch.sampled)))
        scheduler.check_integrity()
    assert scheduler.stats.preemptions == 0


def test_no_more_is_drafted_than_may_come() -> None:
    speculation = Speculation(Guess(whole, lambda: False), FREE)
    scheduler = make(40, budget=10, seqs=4, speculation=speculation)
    for index, most in enumerate((1, 2, 3, 30)):
        scheduler.add(Request(str(index), [3 + index], SamplingParams(max_tokens=most, ignore_eos=True)))
    first = scheduler.schedule()
    assert first is not None and not first.has_drafts
    scheduler.commit(first, [whole(item.sequence)[0] for item in first.sampled])
    batch = scheduler.schedule()
    assert batch is not None
    # Of ten tokens a step three are those of the running sequences, and the drafts that are left are the last one's.
    assert {item.sequence.id: len(item.drafts) for item in batch.items} == {"1": 0, "2": 1, "3": 6}


def test_a_stop_token_ends_an_answer_inside_a_run() -> None:
    prompt, params = [3, 4, 5], SamplingParams(max_tokens=30, ignore_eos=True)
    answer = alone(prompt, params, 99)
    stop = answer[6]
    count = answer.index(stop) + 1
    speculation = Speculation(Guess(whole, lambda: False), FREE)
    scheduler = make(40, speculation=speculation)
    request = Request("0", prompt, SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))
    assert drive(scheduler, [request], False, {})["0"] == answer[:count]
    assert speculation.accepted < speculation.drafted


def test_log_probabilities_are_those_of_the_tokens_that_come() -> None:
    speculation = Speculation(Guess(whole, lambda: False), FREE)
    scheduler = make(40, speculation=speculation)
    scheduler.add(Request("0", [3, 4, 5], SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0)))
    first = scheduler.schedule()
    assert first is not None
    sequence = first.sampled[0].sequence
    answer = whole(sequence)
    scheduler.commit(first, answer[:1], [TokenLogprob(-0.5, [])])
    batch = scheduler.schedule()
    assert batch is not None and batch.sampled[0].drafts == tuple(answer[1:4])
    sampled = [*answer[1:3], 999, 999]
    outputs = scheduler.commit(batch, sampled, [TokenLogprob(-float(row), []) for row in range(4)])
    assert outputs == [
        Output("0", [*answer[1:3], 999], None, None, [TokenLogprob(-float(row), []) for row in range(3)])
    ]
    assert sequence.num_computed_tokens == len(sequence.token_ids) - 1


def test_blocks_are_found_by_what_was_accepted_alone() -> None:
    speculation = Speculation(Guess(whole, lambda: False), FREE)
    scheduler = make(40, budget=32, speculation=speculation)
    request = Request("0", [3, 4, 5], SamplingParams(max_tokens=14, ignore_eos=True))
    answer = drive(scheduler, [request], False, {})["0"]
    tokens = [*request.token_ids, *answer]
    again = Sequence("1", [*tokens, 9], SamplingParams(), 99)
    assert scheduler.blocks.match_prefix(again).blocks == 4  # all but the last token, which was never computed
    other = Sequence("2", [*tokens[:10], 9, 9, 9, 9, 9], SamplingParams(), 99)
    assert scheduler.blocks.match_prefix(other).blocks == 2


@pytest.mark.parametrize(
    ("text", "most", "proposed", "length"),
    [
        ("abcdef", 4, None, 0),
        ("abcdefgabc", 3, "def", 3),
        ("abcdefgabc", 9, "defgabcde", 3),  # it goes on with what it has proposed
        ("xabcdyabczabc", 2, "za", 3),  # the last time
        ("xabcd1yabc2zabcd", 2, "1y", 4),  # the longer run
        ("aaaa", 3, "aaa", 3),
        ("abcdefghijklm.abcdefghijkl", 1, "m", MOST_COMPARED),
    ],
)
def test_prompt_lookup(text: str, most: int, proposed: str | None, length: int) -> None:
    ids = [ord(letter) for letter in text]
    match = NgramIndex().find(ids, most)
    assert match == (None if proposed is None else Match([ord(letter) for letter in proposed], length))
    growing, found = NgramIndex(), None
    for end in range(1, len(ids) + 1):
        found = growing.find(ids[:end], most)
    assert found == match
