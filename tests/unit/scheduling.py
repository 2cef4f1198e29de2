"""Schedulers with a pretend KV cache that checks every read, driven to the end."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import islice
from math import lcm
from weakref import WeakKeyDictionary

import pytest
from hypothesis import strategies as st

from tpctl.accounting import KvLayout
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.limits import Limits
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.scheduler import Scheduler
from tpctl.engine.scheduling.sequence import LATE, NOT_FINITE, Sequence
from tpctl.engine.scheduling.speculation import Speculation, verified
from tpctl.engine.scheduling.states import StatePool
from tpctl.wire.messages import Request
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
        self.apart = scheduler.states is not None and scheduler.states.apart

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
        if self.apart and item.drafts:
            assert len(item.state.keeps) == 1 + len(item.drafts)
            assert item.state.source not in (copy for _, copy in item.state.keeps)
        else:
            self.states[item.state.slot] = tokens[: item.end], broken or BROKEN in new
        return broken or BROKEN in new

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
    apart: bool = False,
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size, layout=layout)
    longest = blocks.layout.longest(num_blocks)
    return Scheduler(
        blocks,
        Limits(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=length if longest is None else min(length, longest),
            vocab_size=1000,
            eos_token_ids=frozenset({7}),
        ),
        states=StatePool(states, blocks, apart=apart) if states else None,
        speculation=speculation,
    )


def alone(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens and len(tokens) < max_model_len:
        tokens.append(next_token(tokens))
        if tokens[-1] == 7 and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


def drive(
    scheduler: Scheduler,
    requests: list[Request],
    overlap: bool,
    aborts: dict[int, str],
    late: random.Random | None = None,
) -> dict[str, list[int]]:
    """Run to the end, one step ahead of the results if ``overlap``, with some rows ``late`` if not; what each request
    produced."""
    cache = CACHES.setdefault(scheduler, Cache(scheduler))
    known = {r.id: list(r.token_ids) for r in requests}
    found: dict[str, list[int]] = {r.id: [] for r in requests}
    for request in requests:
        assert scheduler.add(request) is None
    pending: list[tuple[ScheduledBatch, list[int]]] = []
    for step in range(10_000):
        if not scheduler.has_work and not pending and not scheduler.left_out:
            break
        for id in list(scheduler.left_out):
            if late is not None and late.random() < 0.3:
                scheduler.found(id, None)
        if step in aborts:
            scheduler.abort(aborts[step])
        batch = scheduler.schedule()
        if batch is not None:
            assert batch.num_tokens <= scheduler.limits.max_num_batched_tokens
            assert len(scheduler.running) <= scheduler.limits.max_num_seqs
            assert all(item.is_decode == (row < batch.num_decodes) for row, item in enumerate(batch.items))
            sampled = cache.run(batch, known)
            assert len(sampled) == batch.num_sampled
            if late is not None and not overlap:
                sampled = [LATE if late.random() < 0.2 else token for token in sampled]
            rows = iter(sampled)
            for item in batch.sampled:
                tokens = known[item.sequence.id]
                del tokens[item.places.start :]
                came = list(islice(rows, len(item.places)))
                tokens += verified(item.drafts, came) if came[0] != LATE else []
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

DRAWN = {
    "seed": st.integers(0, 2**32),
    "num_blocks": st.integers(6, 40),
    "budget": st.integers(8, 40),
    "abort": st.booleans(),
    "border": st.sampled_from([5, 12, 16, 17, 1000]),
    "broken": st.booleans(),
    "states": st.sampled_from([0, 1, 2, 3, 9, 40]),
    "layout": st.sampled_from(LAYOUTS),
}
"""Of a scheduler that is driven at random: tokens of a table's ``border``, and of a step's ``budget``."""


def drive_at_random(
    scheduler: Scheduler, rng: random.Random, *, overlap: bool, abort: bool, broken: bool, late: bool = False
) -> tuple[list[Request], dict[str, list[int]]]:
    """Requests of any kind, some beginning alike, some aborted or broken, have the answers that each has alone."""
    prefix = [rng.randrange(3, 9) for _ in range(9)]
    requests = []
    longest = scheduler.limits.max_model_len
    for index in range(12):
        shared = prefix[: rng.choice([0, 0, 4, 9])]
        prompt = (shared + [rng.randrange(3, 9) for _ in range(rng.randint(1, 14))])[: longest - 1]
        if broken and rng.random() < 0.3:
            prompt[rng.randrange(len(prompt))] = BROKEN
        params = SamplingParams(max_tokens=rng.randint(1, 20), ignore_eos=rng.random() < 0.5)
        requests.append(Request(str(index), prompt, params))
    aborts = {rng.randrange(20): str(rng.randrange(12)) for _ in range(3)} if abort else {}
    found = drive(scheduler, requests, overlap, aborts, rng if late else None)
    for request in requests:
        expected = alone(request.token_ids, request.sampling, scheduler.limits.max_model_len)
        if BROKEN in request.token_ids:
            expected = []
        if request.id in aborts.values():
            assert found[request.id] == expected[: len(found[request.id])]
        else:
            assert found[request.id] == expected
    return requests, found


def served(scheduler: Scheduler, id: str, prompt: list[int], count: int) -> tuple[list[int], int]:
    """An answer, and how many tokens of its prompt were spared."""
    before = scheduler.blocks.hit_tokens
    answer = drive(scheduler, [Request(id, prompt, SamplingParams(max_tokens=count, ignore_eos=True))], False, {})[id]
    return answer, scheduler.blocks.hit_tokens - before
