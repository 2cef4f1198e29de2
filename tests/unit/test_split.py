"""The cuts of one axis: nothing lost, nothing doubled, heads whole and beside the KV heads they read."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.errors import PartitionError
from tpctl.partition.cuts import ALIGNMENT, Range, Vocab, pad_vocab, split_aligned, split_evenly, split_heads


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
