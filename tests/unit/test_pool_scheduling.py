"""Pools of blocks on shared memory: what a window keeps, what the prefix cache finds, and who is given which slab."""

from __future__ import annotations

import pytest

from tests.unit.scheduling import drive, make, served
from tpctl.accounting import KeptLayer, KvLayout, LayerPools, layer_pools
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduler import Scheduler
from tpctl.engine.scheduling.sequence import GONE, Sequence
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams

MIXED = KvLayout(4, (None, 9), (5, 1))
"""Blocks of 4 tokens; of layers that see all, and of five times as many that see 9. A token sees three blocks of these,
or two; the next one's window begins in the last but one."""


def held(sequence: Sequence) -> list[list[int]]:
    """The places in its block tables where it has blocks."""
    return [[index for index, block in enumerate(table) if block != GONE] for table in sequence.block_tables]


def sequence_of(count: int) -> Sequence:
    return Sequence("a", list(range(100, 100 + count)), SamplingParams(), 256)


@pytest.mark.parametrize(
    ("window", "kept"),
    # The next token is number 20, counted from 0, and sees the tokens from 21 - window on.
    [(1, [5]), (4, [4, 5]), (5, [4, 5]), (6, [3, 4, 5]), (9, [3, 4, 5]), (10, [2, 3, 4, 5]), (21, [0, 1, 2, 3, 4, 5])],
)
def test_a_block_goes_when_no_later_token_sees_any_of_it(window: int, kept: list[int]) -> None:
    blocks = BlockManager(40, 4, layout=KvLayout(4, (None, window), (1, 1)))
    sequence = sequence_of(21)
    assert blocks.grow(sequence, 20)
    sequence.num_computed_tokens = 20
    assert blocks.grow(sequence, 21)
    assert held(sequence) == [[0, 1, 2, 3, 4, 5], kept]
    assert len(kept) <= blocks.layout.blocks(1, 21)
    blocks.check_integrity([sequence])


def test_a_chunk_keeps_what_its_first_token_sees() -> None:
    blocks = BlockManager(40, 4, layout=MIXED)
    sequence = sequence_of(60)
    assert blocks.grow(sequence, 24)
    sequence.num_computed_tokens = 24
    assert blocks.grow(sequence, 54)  # token 24 sees those from 16 on
    assert held(sequence) == [list(range(14)), list(range(4, 14))]
    sequence.num_computed_tokens = 54
    assert blocks.grow(sequence, 57)
    assert held(sequence)[1] == [11, 12, 13, 14]  # from 46 on


def test_chunks_are_as_small_as_there_is_room() -> None:
    """64 tokens in sight of all take 16 blocks, in four slabs; three more are what a window needs at least."""
    scheduler = make(7, budget=100, layout=MIXED)
    assert scheduler.limits.max_model_len == 64
    prompt = [number % 50 + 3 for number in range(60)]
    drive(scheduler, [Request("a", prompt, SamplingParams(max_tokens=9, ignore_eos=True))], True, {})
    assert scheduler.stats.preemptions == 0 and scheduler.stats.computed_tokens == 63
    # A chunk of 12 tokens in the three slabs, then one of 3 or 4 for each block that is given back.
    assert scheduler.stats.steps > 3 + 6


def test_memory_goes_from_one_pool_to_another() -> None:
    """Twelve slabs hold six sequences of a block, and one of 145 tokens, and then the six again."""
    scheduler = make(12, budget=40, length=1000, layout=MIXED)
    assert scheduler.limits.max_model_len == 5 * 9 * 4
    for turn in range(3):
        short = [Request(f"{turn} {n}", [5 + 6 * turn + n] * 3, SamplingParams(max_tokens=1)) for n in range(6)]
        drive(scheduler, short, False, {})
        long = Request(f"{turn} long", [3 + turn] * 140, SamplingParams(max_tokens=6, ignore_eos=True))
        drive(scheduler, [long], False, {})
    assert scheduler.stats.preemptions == 0 and scheduler.blocks.evictions > 0


def test_a_prefix_needs_the_windows_before_it() -> None:
    scheduler = make(200, budget=100, layout=MIXED)
    prompt = list(range(100, 142))  # ten blocks and two tokens
    assert served(scheduler, "first", prompt, 1)[1] == 0
    assert served(scheduler, "again", prompt, 1)[1] == 40
    assert served(scheduler, "goes on", [*prompt, 9, 9, 9], 1)[1] == 40
    assert served(scheduler, "parts", [*prompt[:22], *[20] * 9], 1)[1] == 20
    lose(scheduler, prompt, 4)  # which who goes on behind block 5 or 6 sees
    assert served(scheduler, "parts again", [*prompt[:22], *[21] * 9], 1)[1] == 16
    # It has computed what was lost, and left it.
    assert served(scheduler, "and again", [*prompt[:22], *[22] * 9], 1)[1] == 20
    lose(scheduler, prompt, 9)
    assert served(scheduler, "the end is lost", prompt, 1)[1] == 36


def lose(scheduler: Scheduler, prompt: list[int], index: int) -> None:
    """Let nobody find the window layers' block of that number any more."""
    blocks = scheduler.blocks
    digest = blocks.digest(Sequence("x", prompt, SamplingParams(), 256), index + 1)
    blocks.slabs.drop(blocks.pools[1], blocks.pools[1].cached[digest])
    blocks.check_integrity()


def test_where_all_layers_have_windows_only_these_are_needed() -> None:
    scheduler = make(200, budget=100, layout=KvLayout(4, (9,), (1,)))
    prompt = list(range(100, 142))
    served(scheduler, "first", prompt, 1)
    digest = scheduler.blocks.digest(sequence_of(42), 1)
    (pool,) = scheduler.blocks.pools
    scheduler.blocks.slabs.drop(pool, pool.cached[digest])
    assert served(scheduler, "again", prompt, 1)[1] == 40
    answer, _ = served(scheduler, "talks", [50] * 10, 15)  # 25 tokens, of which the last is not computed
    assert served(scheduler, "next turn", [*[50] * 10, *answer, 8, 8], 1)[1] == 24


def test_what_windows_have_passed_goes_first_but_for_ends_and_parting_places() -> None:
    scheduler = make(62, seqs=2, budget=400, length=400, layout=KvLayout(4, (None, 9), (1, 1)))
    system = list(range(200, 216))  # four blocks
    served(scheduler, "first", [*system, *[30] * 8, 1], 1)
    served(scheduler, "second", [*system, *[31] * 8, 1], 1)  # the prompts part behind block 4
    first = [[70] * 41, [71] * 41, [72] * 41]
    for number, prompt in enumerate(first):  # ten blocks of each pool, of which a window sees two
        served(scheduler, str(number), prompt, 1)
    assert 0 < scheduler.blocks.evictions <= 2 + 8 + 8
    assert served(scheduler, "third", [*system, *[32] * 8, 1], 1)[1] == 16
    for number, prompt in enumerate(first):
        assert served(scheduler, f"{number} again", prompt, 1)[1] == 40


def test_a_sequence_alone_that_finds_itself_too_widely_spread_is_computed_anew() -> None:
    """One block of each of many slabs is its own, which leaves none for its windows."""
    layout = KvLayout(4, (None, 9), (5, 1))
    scheduler = make(10, budget=100, length=1000, layout=layout)
    longest = scheduler.limits.max_model_len
    assert longest == 5 * 7 * 4
    blocks, whole = scheduler.blocks, scheduler.blocks.pools[0]
    prompt = [number % 40 + 3 for number in range(longest - 12)]
    drive(scheduler, [Request("a", prompt, SamplingParams(max_tokens=1))], False, {})
    # As if its blocks had been taken one by one, beside others that have ended.
    for slab in list(whole.idle)[1:]:
        for block in list(whole.blocks(slab))[1:]:
            blocks.slabs.drop(whole, block)
    found = drive(scheduler, [Request("b", prompt, SamplingParams(max_tokens=12, ignore_eos=True))], False, {})
    assert len(found["b"]) == 12


def test_integrity_check_finds_what_is_lost_in_a_pool() -> None:
    blocks = BlockManager(20, 4, layout=MIXED)
    sequence = sequence_of(21)
    assert blocks.admit(sequence, blocks.nothing, 21, 21)
    sequence.num_computed_tokens = 20
    blocks.check_integrity([sequence])
    sequence.block_tables[1][4] = GONE
    with pytest.raises(AssertionError, match="has lost a block"):
        blocks.check_integrity([sequence])
    blocks = BlockManager(20, 4, layout=MIXED)
    blocks.slabs.empty.pop()
    with pytest.raises(AssertionError, match="slabs overlap or leak"):
        blocks.check_integrity([])
    blocks = BlockManager(20, 4, layout=MIXED)
    assert blocks.admit(sequence_of(3), blocks.nothing, 3, 3)
    blocks.pools[0].raw.popitem()
    with pytest.raises(AssertionError, match="users"):
        blocks.check_integrity([])


def test_which_layers_share_a_pool() -> None:
    full, window, longer = KeptLayer(None, 4, 8), KeptLayer(9, 4, 8), KeptLayer(20, 4, 8)
    mixed = [window, full, window, longer]
    assert layer_pools([mixed], 100) == LayerPools((None, 9, 20), (1, 0, 1, 2))
    assert layer_pools([mixed], 20) == LayerPools((None, 9), (1, 0, 1, 0))  # no sequence is longer
    assert layer_pools([mixed], 9) == LayerPools((None,), (0, 0, 0, 0))
    assert layer_pools([[window] * 3], 100) == LayerPools((9,), (0, 0, 0))
    wide = KeptLayer(None, 2, 16)
    assert layer_pools([[window, wide]], 100) == LayerPools((None, 9), (1, 0))
    assert layer_pools([[window, wide]], 100, "fp8") == LayerPools((None,), (0, 0))
    assert layer_pools([[window, full, wide]], 100) == LayerPools((None,), (0, 0, 0))
    # Alike on one rank, and not on another, is not alike.
    assert layer_pools([[window, full, full], [window, full, wide]], 100) == LayerPools((None,), (0, 0, 0))
    assert layer_pools([[]], 100) == LayerPools((None,), ())
