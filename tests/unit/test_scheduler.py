"""The scheduler and block manager, driven by a model that is a function of the tokens."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import islice
from math import lcm
from weakref import WeakKeyDictionary

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.accounting import KvLayout
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence, StateUse
from tpctl.engine.scheduling.scheduler import Scheduler
from tpctl.engine.scheduling.sequence import NOT_FINITE, Sequence
from tpctl.engine.scheduling.speculation import Speculation, verified
from tpctl.engine.scheduling.states import StatePool
from tpctl.wire.messages import Output, Request
from tpctl.wire.sampling import SamplingParams


def next_token(tokens: list[int]) -> int:
    """A stand-in for a model: depends on every token before."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + len(tokens)) % 50 + 3


BROKEN = 60
"""A token that ``next_token`` never gives. Whatever is computed together with it becomes NaN."""


class Cache:
    """Pretends to be the KV cache: remembers which token every slot was written for, by which rotary table and whether
    it is NaN, and checks every read that a layer of each pool would do. Of states it remembers which tokens they have
    seen."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.blocks = scheduler.blocks
        self.block_size = scheduler.blocks.block_size
        self.rope_offset = scheduler.rope_offset
        self.slots: dict[tuple[Fraction, int], tuple[int, int, int, bool]] = {}
        self.states: dict[int, tuple[list[int], bool]] = {}

    def run(self, batch: ScheduledBatch, known: dict[str, list[int]]) -> list[int]:
        for item in batch.items:
            sequence = item.sequence
            new = self._new(item, known)
            if item.samples:
                assert sequence.rope_offset == self.rope_offset(item.end)
            for number in range(len(self.blocks.pools)):
                for at, token in enumerate(new, item.start):
                    written = number, token, sequence.rope_offset, BROKEN in new
                    self.slots |= dict.fromkeys(self._places(number, sequence, at), written)
        for item in batch.items:
            self._spread(item)
        sampled, spoilt = [], {item.sequence.id for item in batch.items if self._spoils_state(item, known)}
        for item in batch.items:
            tokens = known[item.sequence.id][: item.start] + self._new(item, known)
            broken = [item.sequence.id in spoilt] * item.end
            for number, pool in enumerate(self.blocks.pools):
                first = 0 if pool.window is None else max(0, item.start - pool.window + 1)
                for at in range(first, item.end):
                    places = self._places(number, item.sequence, at)
                    (found,) = {self.slots[place] for place in places}
                    expected = number, tokens[at], item.sequence.rope_offset
                    assert found[:3] == expected, f"{item.sequence} reads another sequence's keys"
                    broken[at] |= found[3]
            for place in item.places:
                sampled.append(NOT_FINITE if any(broken[:place]) else next_token(tokens[:place]))
        return sampled

    def _spread(self, item: ScheduledSequence) -> None:
        """Whatever sees NaN becomes NaN, also where what it sees is out of sight of those behind it."""
        for number, pool in enumerate(self.blocks.pools):
            first = 0 if pool.window is None else max(0, item.start - pool.window + 1)
            seen = [place for at in range(first, item.end) for place in self._places(number, item.sequence, at)]
            if any(self.slots[place][3] for place in seen):
                own = range(item.start, item.end)
                for place in (
                    p for n in range(len(self.blocks.pools)) for at in own for p in self._places(n, item.sequence, at)
                ):
                    self.slots[place] = *self.slots[place][:3], True

    @staticmethod
    def _new(item: ScheduledSequence, known: dict[str, list[int]]) -> list[int]:
        """An item's tokens, also those that the scheduler does not know yet."""
        return [*known[item.sequence.id][item.start : item.end - len(item.drafts)], *item.drafts]

    def _spoils_state(self, item: ScheduledSequence, known: dict[str, list[int]]) -> bool:
        """Let a sequence's state see its new tokens; whether it is NaN then."""
        if item.state is None:
            return False
        new = self._new(item, known)
        tokens = known[item.sequence.id][: item.start] + new
        seen, broken = ([], False) if item.state.source is None else self.states[item.state.source]
        assert seen == tokens[: item.start], f"{item.sequence} goes on from another sequence's state"
        for after, copy in item.state.keeps:
            assert copy != item.state.slot and 0 < after <= item.num_new_tokens
            self.states[copy] = tokens[: item.start + after], broken or BROKEN in new
        self.states[item.state.slot] = tokens[: item.end], broken or BROKEN in new
        return self.states[item.state.slot][1]

    def _places(self, pool: int, sequence: Sequence, at: int) -> list[tuple[Fraction, int]]:
        """What a token's keys take of memory, whichever pool it is: parts of a slab as small as any pool's blocks
        need, and the place in the block."""
        block, per_slab = sequence.block_tables[pool][at // self.block_size], self.blocks.pools[pool].per_slab
        assert block >= 0, f"{sequence} reads what its window has passed"
        part = Fraction(1, lcm(*(one.per_slab for one in self.blocks.pools)))
        begin, count = Fraction(block, per_slab), Fraction(1, per_slab) / part
        return [(begin + number * part, at % self.block_size) for number in range(int(count))]


CACHES: WeakKeyDictionary[Scheduler, Cache] = WeakKeyDictionary()
"""One a scheduler, which may be driven several times."""


def make(
    num_blocks: int,
    block_size: int = 4,
    seqs: int = 8,
    budget: int = 32,
    length: int = 64,
    states: int = 0,
    layout: KvLayout | None = None,
    speculation: Speculation | None = None,
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size, layout=layout)
    longest = blocks.layout.longest(num_blocks)
    return Scheduler(
        blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=length if longest is None else min(length, longest),
        vocab_size=1000,
        eos_token_ids=[7],
        states=StatePool(states, blocks) if states else None,
        speculation=speculation,
    )


def alone(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens and len(tokens) < max_model_len:
        tokens.append(next_token(tokens))
        if tokens[-1] == 7 and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


def drive(scheduler: Scheduler, requests: list[Request], overlap: bool, aborts: dict[int, str]) -> dict[str, list[int]]:
    """Run to the end, one step ahead of the results if ``overlap``; what each request produced."""
    cache = CACHES.setdefault(scheduler, Cache(scheduler))
    known = {r.id: list(r.token_ids) for r in requests}
    found: dict[str, list[int]] = {r.id: [] for r in requests}
    for request in requests:
        assert scheduler.add(request) is None
    pending: list[tuple[ScheduledBatch, list[int]]] = []
    for step in range(10_000):
        if not scheduler.has_work and not pending:
            break
        if step in aborts:
            scheduler.abort(aborts[step])
        batch = scheduler.schedule()
        if batch is not None:
            assert batch.num_tokens <= scheduler.max_num_batched_tokens
            assert len(scheduler.running) <= scheduler.max_num_seqs
            assert all(item.is_decode == (row < batch.num_decodes) for row, item in enumerate(batch.items))
            sampled = cache.run(batch, known)
            assert len(sampled) == batch.num_sampled
            rows = iter(sampled)
            for item in batch.sampled:
                tokens = known[item.sequence.id]
                del tokens[item.places.start :]
                tokens += verified(item.drafts, list(islice(rows, len(item.places))))
            pending.append((batch, sampled))
        if pending and (not overlap or len(pending) > 1 or batch is None):
            for output in scheduler.commit(*pending.pop(0)):
                assert BROKEN not in known[output.id] or output.finish_reason == "error"
                found[output.id] += output.token_ids
        scheduler.check_integrity()
    else:
        pytest.fail("the scheduler does not come to an end")
    assert scheduler.blocks.num_free_slabs == scheduler.blocks.num_slabs
    return found


LAYOUTS = [
    KvLayout(4),
    KvLayout(4, (7,), (1,)),
    KvLayout(4, (None, 9), (1, 1)),
    KvLayout(4, (None, 9), (5, 1)),
    KvLayout(4, (None, 1), (3, 2)),
    KvLayout(4, (None, 4, 14), (1, 4, 2)),
]


def drive_at_random(
    scheduler: Scheduler, rng: random.Random, *, overlap: bool, abort: bool, broken: bool
) -> tuple[list[Request], dict[str, list[int]]]:
    """Requests of any kind, some beginning alike, some aborted or broken, have the answers that each has alone."""
    prefix = [rng.randrange(3, 9) for _ in range(9)]
    requests = []
    for index in range(12):
        shared = prefix[: rng.choice([0, 0, 4, 9])]
        prompt = (shared + [rng.randrange(3, 9) for _ in range(rng.randint(1, 14))])[: scheduler.max_model_len - 1]
        if broken and rng.random() < 0.3:
            prompt[rng.randrange(len(prompt))] = BROKEN
        params = SamplingParams(max_tokens=rng.randint(1, 20), ignore_eos=rng.random() < 0.5)
        requests.append(Request(str(index), prompt, params))
    aborts = {rng.randrange(20): str(rng.randrange(12)) for _ in range(3)} if abort else {}
    found = drive(scheduler, requests, overlap, aborts)
    for request in requests:
        expected = alone(request.token_ids, request.sampling, scheduler.max_model_len)
        if BROKEN in request.token_ids:
            expected = []
        if request.id in aborts.values():
            assert found[request.id] == expected[: len(found[request.id])]
        else:
            assert found[request.id] == expected
    return requests, found


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(6, 40),
    overlap=st.booleans(),
    budget=st.integers(8, 40),
    abort=st.booleans(),
    border=st.sampled_from([5, 12, 16, 17, 1000]),
    broken=st.booleans(),
    states=st.sampled_from([0, 1, 2, 3, 9, 40]),
    layout=st.sampled_from(LAYOUTS),
)
def test_batched_equals_alone(
    seed: int,
    num_blocks: int,
    overlap: bool,
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
    drive_at_random(scheduler, rng, overlap=overlap, abort=abort, broken=broken)


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


def served(scheduler: Scheduler, id: str, prompt: list[int], count: int) -> tuple[list[int], int]:
    """An answer, and how many tokens of its prompt were spared."""
    before = scheduler.blocks.hit_tokens
    answer = drive(scheduler, [Request(id, prompt, SamplingParams(max_tokens=count, ignore_eos=True))], False, {})[id]
    return answer, scheduler.blocks.hit_tokens - before


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
        scheduler.context_full = "full"
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
