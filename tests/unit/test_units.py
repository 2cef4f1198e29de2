"""Sizes and rank lists as people write them."""

from __future__ import annotations

import pytest

from tpctl.cli.units import parse_bytes, parse_ranks
from tpctl.errors import UsageError, format_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("1.5MiB", 3 << 19),
        ("2KiB", 2048),
        ("3kB", 3000),
        ("1TB", 10**12),
        ("7B", 7),
        ("0" * 45 + "5GB", 5 * 10**9),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "1e9", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size; write it like 5GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0", "0 is less than a byte"),
        ("0GB", "0GB is less than a byte"),
        ("0.5B", "0.5B is less than a byte"),
        ("0.9", "0.9 is less than a byte"),
        ("1000001TB", "1000001TB is more than 1000000.00 TB"),
        ("9" * 400, f"{'9' * 39}… is more than 1000000.00 TB"),
    ],
)
def test_sizes_that_nothing_has(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"{said}; write a size like 5GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["80", " 5", "999", "1.5"])
def test_a_small_number_without_a_unit_is_not_taken_for_bytes(text: str) -> None:
    with pytest.raises(UsageError, match=f"{text.strip()} would be {text.strip()} bytes; .* like {text.strip()}GiB"):
        parse_bytes(text, "GiB")


def test_sizes_are_written_in_decimal_units() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 143417896, 8.2e9, 2e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "143.4 MB",
        "8.2 GB",
        "2.00 TB",
    ]


@pytest.mark.parametrize(
    ("text", "ranks"), [(None, None), ("3", [3]), ("0-3", [0, 1, 2, 3]), ("0, 2,5-6", [0, 2, 5, 6])]
)
def test_rank_lists(text: str | None, ranks: list[int] | None) -> None:
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "0,,1", "0-1-2"])
def test_no_rank_lists(text: str) -> None:
    with pytest.raises(UsageError, match="is no list of ranks; write it like 0-3"):
        parse_ranks(text)


@pytest.mark.parametrize("text", ["0-999999999", "0-99999,7", "0-999999999999999"])
def test_rank_lists_too_long_to_mean_anything(text: str) -> None:
    with pytest.raises(UsageError, match="names more than 100,000 ranks"):
        parse_ranks(text)
