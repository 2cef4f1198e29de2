"""Prompts beside decodes: how many a step, in which order, and how soon a job ends."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.limits import Limits
from tpctl.engine.scheduling.pacing import Pace, leeway, pays, prefill_budget
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.scheduling.scheduler import Scheduler
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams

PACE = Pace(rows=64, limit=128, chunks=8)
EOS = 7


@pytest.mark.parametrize(
    "policy,megabytes,paced",
    [("fcfs", 436, False), ("makespan", 1, True), ("auto", 436, True), ("auto", 31, True), ("auto", 16, False)],
)
def test_a_pace_pays_where_layers_are_large(policy: str, megabytes: int, paced: bool) -> None:
    assert pays(policy, megabytes * 10**6) == paced


@pytest.mark.parametrize(
    "decodes,work,horizon,pending,budget",
    [
        (0, 5000, 100, [(200, 50)], 64),  # as many as fill the rows
        (40, 5000, 100, [(200, 50)], 24),
        (60, 5000, 100, [(200, 50)], 4),  # what must not start too late: 200 tokens in 50 steps
        (61, 5000, 100, [(200, 50)], 67),  # a step of more rows is a full one of twice as many
        (64, 5000, 100, [(200, 50)], 64),
        (50, 5000, 100, [(700, 90)], 78),
        (58, 5000, 100, [(700, 90)], 70),  # the most that is paced
        (90, 5000, 100, [(700, 90)], None),  # 90 and 70 are more than 128
        (43, 5000, 100, [(100, 95), (1000, 50)], 85),  # 1,100 in 50 steps, 100 in 5
        (42, 5000, 100, [(100, 95), (1000, 50)], 22),
        (0, 5000, 100, [(100, 99)], 128),
        (0, 5000, 100, [(100, 120)], 128),  # too late already: at once
        (0, 12801, 100, [(200, 50)], None),  # more than 128 tokens a step until the end
        (0, 5000, 100, [(2, 98)] * 16, 64),  # 8 chunks in each of 2 steps
        (0, 5000, 100, [(2, 98)] * 17, None),
    ],
)
def test_budget(decodes: int, work: int, horizon: int, pending: list[tuple[int, int]], budget: int | None) -> None:
    assert prefill_budget(PACE, decodes, work, horizon, pending) == budget


def make(pace: Pace | None, blocks: int = 4000) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, 4),
        Limits(
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            max_model_len=1000,
            vocab_size=100,
            eos_token_ids=frozenset({EOS}),
        ),
        pace=pace,
    )


def drive(scheduler: Scheduler, lengths: dict[str, int] | None = None) -> list[ScheduledBatch]:
    """All steps to the end, each one ahead of the results of the one before."""
    steps: list[ScheduledBatch] = []
    taken = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        if batch is not None:
            steps.append(batch)
        if len(steps) > taken + 1 or batch is None:
            ended = [
                EOS if lengths and item.end + 1 >= lengths[item.sequence.id] else 1 for item in steps[taken].sampled
            ]
            scheduler.commit(steps[taken], ended)
            taken += 1
        scheduler.check_integrity()
    return steps


def request(id: int, prompt: int, answer: int) -> Request:
    return Request(str(id), random.Random(id).choices(range(10, 100), k=prompt), SamplingParams(max_tokens=answer))


def job(count: int, seed: int) -> list[Request]:
    pick = random.Random(seed)
    return [request(i, pick.randint(20, 100), pick.randint(10, 200)) for i in range(count)]


@pytest.mark.parametrize("count,largest,beside", [(5, 0, 3), (40, 4 * PACE.limit, 40)])
def test_a_job_ends_as_soon_in_steps_of_few_rows(count: int, largest: int, beside: int) -> None:
    requests = job(count, count)
    fast, paced = make(None), make(PACE)
    for scheduler in (fast, paced):
        for one in requests:
            assert scheduler.add(one) is None
    fast_steps, paced_steps = drive(fast), drive(paced)
    assert max(step.num_tokens for step in fast_steps) > largest
    assert max(step.num_tokens for step in paced_steps) <= PACE.limit
    assert len(paced_steps) <= max(r.sampling.max_tokens for r in requests) + leeway(200) + 1
    assert len([step for step in paced_steps if step.num_prefills and step.num_decodes]) >= beside
    assert paced.stats.paced_steps == len([step for step in paced_steps if step.paced]) > beside
    assert max(step.num_prefills for step in paced_steps) <= PACE.chunks
    assert paced.stats.generated_tokens == fast.stats.generated_tokens == sum(r.sampling.max_tokens for r in requests)


@pytest.mark.parametrize("count,prompt,answer", [(100, 20, 64), (100, 20, 32), (30, 60, 200), (12, 40, 200)])
def test_equal_answers_end_together(count: int, prompt: int, answer: int) -> None:
    """All have to start at once, whatever their number: what is put off from step to step must not add up."""
    scheduler = make(PACE)
    scheduler.limits = replace(scheduler.limits, max_num_seqs=count)
    for i in range(count):
        assert scheduler.add(request(i, prompt, answer)) is None
    # A prompt of the last steps before the end is part of a step of its own at worst.
    assert len(drive(scheduler)) <= answer + leeway(answer) + 2


def test_longest_answers_start_first() -> None:
    scheduler = make(PACE)
    for id, answer in enumerate((30, 200, 90, 200)):
        scheduler.add(request(id, 50, answer))
    order: list[str] = []
    for step in drive(scheduler):
        order += [item.sequence.id for item in step.items if item.sequence.id not in order]
    assert order == ["1", "3", "2", "0"]


@pytest.mark.parametrize(
    "requests",
    [
        [request(i, 60, 40) for i in range(60)],  # all are as long: waiting would make the last one end last
        job(200, 1),  # more than the rows of the longest answer's steps, and than the cache holds
    ],
)
def test_what_cannot_wait_is_computed_as_without_a_pace(requests: list[Request]) -> None:
    shapes = []
    for pace in (None, PACE):
        scheduler = make(pace)
        for one in requests:
            scheduler.add(one)
        steps = drive(scheduler)
        shapes.append([[(item.sequence.id, item.num_new_tokens) for item in step.items] for step in steps])
    assert shapes[0] == shapes[1]


def test_early_ends_only_raise_the_pace() -> None:
    """Answers end after a third of their tokens: the prompts that wait fill the rows that become free."""
    requests = job(40, 3)
    lengths = {r.id: len(r.token_ids) + max(1, r.sampling.max_tokens // 3) for r in requests}
    scheduler = make(PACE)
    for one in requests:
        scheduler.add(one)
    behind: list[int] = []  # sizes of the steps that left a prompt waiting
    original = scheduler.schedule

    def schedule() -> ScheduledBatch | None:
        batch = original()
        if scheduler.waiting and batch is not None:
            behind.append(batch.num_tokens)
        return batch

    scheduler.schedule = schedule  # type: ignore[method-assign]
    steps = drive(scheduler, lengths)
    assert len(behind) > 20
    assert min(behind) >= PACE.rows
    tokens = sum(lengths.values())
    assert len(steps) < tokens / PACE.rows + 200 / 3 + 20


def test_answers_far_shorter_than_they_may_be_end_the_pace() -> None:
    requests = [request(i, 60, 150 + 2 * i) for i in range(50)]
    lengths = {r.id: len(r.token_ids) + 3 for r in requests}
    scheduler = make(PACE)
    for one in requests:
        scheduler.add(one)
    steps = drive(scheduler, lengths)
    assert steps[0].paced
    assert not steps[-1].paced
    assert max(step.num_tokens for step in steps) > PACE.limit


def test_a_job_larger_than_the_cache_is_not_paced() -> None:
    requests = job(30, 5)
    scheduler = make(PACE, blocks=150)
    for one in requests:
        assert scheduler.add(one) is None
    steps = drive(scheduler)
    assert not steps[0].paced
    assert scheduler.stats.preemptions > 0
    assert scheduler.stats.generated_tokens == sum(r.sampling.max_tokens for r in requests)


def test_aborted_requests_keep_the_books() -> None:
    """One that waits, one whose prompt is half computed, one that decodes."""
    scheduler = make(PACE)
    requests = job(40, 5)
    for one in requests:
        assert scheduler.add(one) is None
    while not (scheduler.waiting and any(s.num_uncomputed_tokens > 1 for s in scheduler.running.values())):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch, [1] * len(batch.sampled))
        scheduler.check_integrity()
    half = next(s.id for s in scheduler.running.values() if s.num_uncomputed_tokens > 1)
    decoding = next(s.id for s in scheduler.running.values() if s.num_uncomputed_tokens == 1)
    for id in (scheduler.waiting[0].id, half, decoding):
        assert scheduler.abort(id) is not None
        scheduler.check_integrity()
    drive(scheduler)
    assert scheduler.stats.finished == 37
