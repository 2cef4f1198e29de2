"""The scheduler and block manager, driven by a model that is a function of the tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.scheduling import DRAWN, drive, drive_at_random, make, served
from tpctl.accounting import KvLayout
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduled import StateUse
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.states import StatePool
from tpctl.wire.messages import Output, Request
from tpctl.wire.sampling import SamplingParams


@settings(max_examples=80, deadline=None)
@given(**DRAWN, overlap=st.booleans(), late=st.booleans())
def test_batched_equals_alone(
    seed: int,
    num_blocks: int,
    overlap: bool,
    late: bool,
    budget: int,
    abort: bool,
    border: int,
    broken: bool,
    states: int,
    layout: KvLayout,
) -> None:
    rng = random.Random(seed)
    scheduler = make(num_blocks, budget=budget, states=states, layout=layout)
    scheduler.rope_offset = lambda num_tokens: 64 if num_tokens > border else 0
    drive_at_random(scheduler, rng, overlap=overlap, abort=abort, broken=broken, late=late)


def test_small_cache_preempts_and_evicts() -> None:
    scheduler = make(num_blocks=8)
    requests = [Request(str(i), [3 + i] * 9, SamplingParams(max_tokens=16, ignore_eos=True)) for i in range(4)]
    drive(scheduler, requests, overlap=False, aborts={})
    assert scheduler.stats.preemptions > 0
    assert scheduler.blocks.evictions > 0


def test_finding_its_own_blocks_after_a_preemption_is_no_prefix_hit() -> None:
    scheduler = make(num_blocks=8)
    requests = [Request(str(i), [3 + i] * 5, SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(3)]
    drive(scheduler, requests, overlap=False, aborts={})
    assert scheduler.stats.preemptions > 0
    assert scheduler.blocks.hit_tokens == 0
    assert scheduler.blocks.queried_tokens == 15


def test_cached_tokens_are_told_with_the_first_ones() -> None:
    """Outputs that say tokens alone are what costs least, and nearly all."""
    scheduler, told = make(num_blocks=40), []
    scheduler.add(Request("a", list(range(3, 16)), SamplingParams(max_tokens=3, ignore_eos=True)))
    scheduler.add(Request("b", list(range(3, 16)), SamplingParams(max_tokens=3, ignore_eos=True)))
    while (batch := scheduler.schedule()) is not None:
        told += scheduler.commit(batch, [3] * batch.num_sampled)
    assert [one.num_cached_tokens for one in told if one.id == "b"] == [12, 0, 0]


def test_equal_prompts_share_blocks_within_one_step() -> None:
    scheduler = make(num_blocks=40, budget=100)
    prompt = list(range(3, 16))  # three full blocks and one token
    for index in range(3):
        scheduler.add(Request(str(index), prompt, SamplingParams(max_tokens=2)))
    batch = scheduler.schedule()
    assert batch is not None
    assert [item.num_new_tokens for item in sorted(batch.items, key=lambda i: i.sequence.id)] == [13, 1, 1]
    tables = [item.sequence.block_tables[0] for item in batch.items]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]


def test_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    scheduler = make(num_blocks=40, budget=100)
    first = [3, 4, 5, 6, 7, 8, 9, 10, 11]
    answer = drive(scheduler, [Request("a", first, SamplingParams(max_tokens=8, ignore_eos=True))], False, {})["a"]
    before = scheduler.stats.computed_tokens
    second = [*first, *answer, 12, 13]
    scheduler.add(Request("b", second, SamplingParams(max_tokens=1)))
    scheduler.schedule()
    assert scheduler.stats.computed_tokens - before <= len(second) - len(first) // 4 * 4 - 4


def test_states_are_kept_where_prompts_end_and_part_and_answers_end() -> None:
    scheduler = make(num_blocks=200, budget=100, states=8)
    prompt = list(range(100, 118))  # four blocks and two tokens
    _, spared = served(scheduler, "first", prompt, 1)
    assert spared == 0
    assert served(scheduler, "again", prompt, 1)[1] == 16
    assert served(scheduler, "goes on", [*prompt, 9, 9, 9], 1)[1] == 16
    for number, expected in enumerate([0, 8, 8]):  # others with its first two blocks: the first finds no state there
        assert served(scheduler, f"other {number}", [*prompt[:8], *[20 + number] * 9], 1)[1] == expected
    answer, _ = served(scheduler, "talks", [50] * 10, 15)  # 25 tokens, of which the last is not computed
    assert served(scheduler, "next turn", [*[50] * 10, *answer, 8, 8], 1)[1] == 24
    assert served(scheduler, "another answer", [50] * 10 + [51] * 9, 1)[1] == 8


def test_a_running_sequence_takes_the_state_that_was_used_longest_ago() -> None:
    scheduler = make(num_blocks=200, budget=100, states=3)
    for token in (60, 61, 62):  # each leaves one
        served(scheduler, str(token), [token] * 9, 1)
    assert served(scheduler, "62 again", [62] * 9, 1)[1] == 8
    assert served(scheduler, "60 again", [60] * 9, 1)[1] == 0
    scheduler = make(num_blocks=200, budget=100, states=1)  # which leaves none beside the running one
    served(scheduler, "a", [60] * 9, 1)
    assert served(scheduler, "b", [60] * 9, 1)[1] == 0
    scheduler.check_integrity()


def test_no_state_is_kept_where_prefixes_are_not_shared() -> None:
    scheduler = make(num_blocks=40, budget=100, states=8)
    scheduler.blocks.enable_prefix_caching = False
    scheduler.add(Request("x", [60] * 9, SamplingParams(max_tokens=2)))
    batch = scheduler.schedule()
    assert batch is not None and batch.items[0].state == StateUse(0, None)


@pytest.mark.parametrize("apart", [False, True])
def test_drafts_take_the_slots_of_states_kept_longest(apart: bool) -> None:
    blocks = BlockManager(40, 4)
    pool = StatePool(5, blocks, apart=apart)
    for number in range(3):  # each leaves the state behind its first block, and its own slot
        done = Sequence(str(number), [number] * 6, SamplingParams(), 256)
        pool.begin()
        pool.admit(done, blocks.nothing)
        done.borders = (1,)
        pool.use(done, 0, 6)
        pool.release(done)
    pool.begin()
    sequence = Sequence("a", [9] * 6, SamplingParams(), 256)
    pool.admit(sequence, blocks.nothing)
    assert pool.room_for_drafts(0) == 4 - apart, "one slot is free, three are kept"
    assert pool.room_for_drafts(2) == 2 - apart, "two wait"
    state = pool.use(sequence, 6, 7, drafts=3)
    assert len({state.slot, *(slot for _, slot in state.keeps)}) == 4 + apart
    assert pool.room_for_drafts(0) == 1 - apart
    pool.check_integrity([sequence])
    pool.settle(sequence, 2)
    pool.release(sequence)
    pool.check_integrity()


def test_integrity_check_finds_a_lost_state() -> None:
    blocks = BlockManager(4, 4)
    pool = StatePool(2, blocks)
    sequence = Sequence("a", [1, 2, 3], SamplingParams(), 256)
    pool.admit(sequence, blocks.nothing)
    pool.check_integrity([sequence])
    with pytest.raises(AssertionError, match="overlap or leak"):
        pool.check_integrity([])


def test_tables_of_different_rotary_offsets_are_not_shared() -> None:
    scheduler = make(num_blocks=40, budget=100)
    scheduler.rope_offset = lambda num_tokens: 64 if num_tokens > 20 else 0
    for index, length in enumerate((9, 21, 9, 22)):
        scheduler.add(Request(str(index), [5] * length, SamplingParams(max_tokens=40)))
    batch = scheduler.schedule()
    assert batch is not None
    found = {item.sequence.id: (item.num_new_tokens, item.sequence.rope_offset) for item in batch.items}
    assert found == {"0": (9, 0), "1": (21, 64), "2": (1, 0), "3": (2, 64)}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([5] * 64, "64 tokens, but at most 63"),
        ([5, 1000, 6], "token id 1000, but the model knows ids 0 to 999"),
        ([5, -1], "token id -1, but"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], message: str) -> None:
    scheduler = make(num_blocks=40)
    output = scheduler.add(Request("x", prompt, SamplingParams()))
    assert output is not None
    assert output.finish_reason == "error"
    assert message in (output.message or "")
    assert not scheduler.has_work


@pytest.mark.parametrize("token", [1000, -1, 10**30])
def test_stop_tokens_that_the_model_does_not_know_are_refused(token: int) -> None:
    scheduler = make(num_blocks=40)
    output = scheduler.add(Request("x", [5], SamplingParams(stop_token_ids=(999, 0, token))))
    assert output == Output("x", [], "error", f"stop_token_ids holds {token}, but the model knows ids 0 to 999")
    output = scheduler.add(Request("x", [5], SamplingParams(logit_bias=((999, 1.0), (token, 1.0)))))
    assert output is not None and f"logit_bias holds token {token}, but" in str(output.message)
    assert scheduler.add(Request("x", [5], SamplingParams(stop_token_ids=(999, 0), logit_bias=((999, 1.0),)))) is None


def test_an_answer_that_the_context_cuts_says_so() -> None:
    for max_tokens, note in ((55, "full"), (54, None), (1000, "full")):
        scheduler = make(num_blocks=40)
        scheduler.limits = replace(scheduler.limits, context_full="full")
        scheduler.add(Request("x", [5] * 10, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
        while scheduler.has_work:
            batch = scheduler.schedule()
            assert batch is not None
            (output,) = scheduler.commit(batch, [9])
        assert (len(batch.items[0].sequence.token_ids), output.finish_reason, output.message) == (64, "length", note)


def test_a_sequence_that_crosses_the_border_is_computed_again_once() -> None:
    for overlap in (False, True):
        scheduler = make(num_blocks=40)
        scheduler.rope_offset = lambda num_tokens: 64 if num_tokens > 12 else 0
        drive(scheduler, [Request("x", [5] * 9, SamplingParams(max_tokens=20, ignore_eos=True))], overlap, {})
        # 9 of the prompt and 3 more, then all 13 anew, and one each for 15 of the 16 that follow.
        assert (scheduler.stats.computed_tokens, scheduler.stats.preemptions) == (9 + 3 + 13 + 15, 0)


def test_integrity_check_finds_a_leak() -> None:
    blocks = BlockManager(4, 4)
    sequence = Sequence("a", [1, 2, 3], SamplingParams(), 256)
    assert blocks.admit(sequence, blocks.nothing, 3)
    blocks.check_integrity([sequence])
    with pytest.raises(AssertionError, match="users"):
        blocks.check_integrity([])
