"""The cuts of one axis: nothing lost, nothing doubled, heads whole and beside the KV heads they read."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.errors import PartitionError
from tpctl.partition.cuts import (
    ALIGNMENT,
    Blocks,
    Dealt,
    Even,
    QueryHeads,
    Range,
    Scaled,
    Units,
    Vocab,
    Within,
    pad_vocab,
    split_aligned,
    split_evenly,
    split_heads,
)


@given(total=st.integers(1, 5000), parts=st.integers(1, 64), granularity=st.integers(1, 70))
def test_split_evenly_tiles_the_axis(total: int, parts: int, granularity: int) -> None:
    granules = -(-total // granularity)
    if granules < parts:
        with pytest.raises(PartitionError, match=f"at most {granules}"):
            split_evenly(total, parts, granularity)
        return
    ranges = split_evenly(total, parts, granularity)
    assert [i for rng in ranges for i in range(rng.start, rng.stop)] == list(range(total))
    assert all(len(rng) > 0 for rng in ranges)
    assert all(rng.start % granularity == 0 for rng in ranges)
    sizes = [-(-len(rng) // granularity) for rng in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(total=st.integers(1, 5000), parts=st.integers(1, 16))
def test_split_aligned_is_exact_where_it_divides_and_aligned_where_it_can_be(total: int, parts: int) -> None:
    if total < parts:
        with pytest.raises(PartitionError):
            split_aligned(total, parts)
        return
    ranges = split_aligned(total, parts)
    assert ranges[0].start == 0
    assert ranges[-1].stop == total
    assert all(one.stop == other.start for one, other in pairwise(ranges))
    if total % parts == 0:
        assert {len(rng) for rng in ranges} == {total // parts}
    elif total % ALIGNMENT == 0 and total // ALIGNMENT >= parts:
        assert all(rng.start % ALIGNMENT == 0 for rng in ranges)


@given(kv=st.integers(1, 16), group=st.integers(1, 12), data=st.data())
def test_every_query_head_has_one_owner_who_holds_its_kv_head(kv: int, group: int, data: st.DataObject) -> None:
    heads = kv * group
    tp = data.draw(st.integers(1, heads))
    shares = split_heads(heads, kv, tp)
    assert [h for share in shares for h in range(share.query.start, share.query.stop)] == list(range(heads))
    held = set()
    for share in shares:
        assert len(share.query) > 0
        assert len(share.kv) > 0
        needed = {h // group for h in range(share.query.start, share.query.stop)}
        assert needed == set(range(share.kv.start, share.kv.stop))
        held |= needed
    assert held == set(range(kv))
    if tp > kv:
        assert all(len(share.kv) == 1 for share in shares)
    else:
        assert sum(len(share.kv) for share in shares) == kv


@pytest.mark.parametrize(
    ("tp", "queries", "kv"),
    [
        (1, [9], [(0, 3)]),
        (2, [6, 3], [(0, 2), (2, 3)]),
        (3, [3, 3, 3], [(0, 1), (1, 2), (2, 3)]),
        (4, [2, 1, 3, 3], [(0, 1), (0, 1), (1, 2), (2, 3)]),
        (5, [2, 1, 2, 1, 3], [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3)]),
        (7, [1, 1, 1, 2, 1, 2, 1], [(0, 1)] * 3 + [(1, 2)] * 2 + [(2, 3)] * 2),
        (9, [1] * 9, [(0, 1)] * 3 + [(1, 2)] * 3 + [(2, 3)] * 3),
    ],
)
def test_nine_query_heads_over_three_kv_heads(tp: int, queries: list[int], kv: list[tuple[int, int]]) -> None:
    shares = split_heads(9, 3, tp)
    assert [len(share.query) for share in shares] == queries
    assert [share.kv for share in shares] == [Range(*pair) for pair in kv]


def test_refused_head_counts_name_both_numbers() -> None:
    with pytest.raises(PartitionError, match="size 10 does not fit 9 query heads; use --tp 1 to 9"):
        split_heads(9, 3, 10)
    with pytest.raises(PartitionError, match="size 0 does not fit"):
        split_heads(9, 3, 0)
    with pytest.raises(PartitionError, match="9 query heads do not form equal groups over 2"):
        split_heads(9, 2, 1)


@given(size=st.integers(1, 200_000))
def test_vocabulary_is_padded_up_to_a_multiple_of_64(size: int) -> None:
    padded = pad_vocab(size)
    assert padded % 64 == 0
    assert size <= padded < size + 64


@given(size=st.integers(1, 3000), tp=st.integers(1, 9))
def test_vocabulary_ranges_tile_the_padded_rows(size: int, tp: int) -> None:
    ranges = Vocab().ranges(size, tp)
    assert [i for rng in ranges for i in range(rng.start, rng.stop)] == list(range(pad_vocab(size)))


@given(length=st.integers(1, 3000), unit=st.sampled_from([8, 32, 128]), tp=st.integers(1, 24), even=st.booleans())
def test_borders_are_where_blocks_end_unless_ranks_outnumber_them(length: int, unit: int, tp: int, even: bool) -> None:
    cut, units = Blocks(unit, fine=8, even=even), -(-length // unit)
    if -(-length // 8) < tp:
        with pytest.raises(PartitionError):
            cut.ranges(length, tp)
        return
    ranges = cut.ranges(length, tp)
    assert [place for held in ranges for place in range(held.start, held.stop)] == list(range(length))
    assert all(held.start % 8 == 0 for held in ranges)
    if units >= tp and not even:
        assert all(held.start % unit == 0 for held in ranges)
    if even and length % (tp * 8) == 0:
        assert {len(held) for held in ranges} == {length // tp}


@given(length=st.integers(1, 3000), unit=st.sampled_from([3, 8, 128]), tp=st.integers(1, 8), before=st.integers(0, 127))
def test_the_entry_of_every_element_is_where_the_element_is(length: int, unit: int, tp: int, before: int) -> None:
    """Also where the axis begins inside of the first one."""
    if length < tp:
        return
    before %= unit
    held = Even().ranges(length, tp)
    units = Units(Even(), unit, length, before=before)
    entries = units.ranges(-(-(before + length) // unit), tp)
    for elements, own in zip(held, entries, strict=True):
        inside = {(before + place) // unit for place in range(elements.start, elements.stop)}
        assert inside == set(range(own.start, own.stop))
        assert units.divides(elements.start) == ((before + elements.start) // unit * unit != before + elements.start)


def test_a_border_inside_of_packed_values_is_refused() -> None:
    heads = QueryHeads(num_heads=4, num_kv_heads=2, head_dim=6)
    assert Units(heads, 6, 24, packed=True).ranges(4, 4) == (Range(0, 1), Range(1, 2), Range(2, 3), Range(3, 4))
    with pytest.raises(PartitionError, match="at tp 4 a border would fall on element 6, inside of a word that packs 8"):
        Units(heads, 8, 24, packed=True).ranges(3, 4)


def test_gate_and_up_side_by_side_stay_together() -> None:
    assert Scaled(Even(), 2).ranges(10, 3) == (Range(0, 4), Range(4, 8), Range(8, 10))


@pytest.mark.parametrize(("groups", "tp"), [(1, 4), (2, 4), (4, 4), (2, 6), (3, 6)])
def test_experts_and_their_insides_are_dealt_to_a_grid_of_ranks(groups: int, tp: int) -> None:
    experts, inside = Dealt(groups).ranges(7, tp), Within(Even(), groups).ranges(40, tp)
    held = [
        (expert, place)
        for mine, part in zip(experts, inside, strict=True)
        for expert in range(mine.start, mine.stop)
        for place in range(part.start, part.stop)
    ]
    assert sorted(held) == [(expert, place) for expert in range(7) for place in range(40)]


def test_groups_that_are_not_alike_are_refused() -> None:
    with pytest.raises(PartitionError, match="6 ranks do not form 4 equal groups; use --ep 1, 2, 3, 6"):
        Dealt(4).ranges(8, 6)
    with pytest.raises(PartitionError, match=r"1 rank does not form 4 equal groups; use --ep 1$"):
        Dealt(4).ranges(8, 1)
