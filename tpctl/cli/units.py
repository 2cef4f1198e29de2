"""Sizes and rank lists as people write them."""

from __future__ import annotations

import re

from tpctl.errors import UsageError, format_bytes, shorten

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": (1000 if kind == "B" else 1024) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for kind in ("B", "iB")
}

_MOST_RANKS = 100_000

_LARGEST = 10**18

_LEAST_BARE = 1000
"""A number without a unit is bytes; one below this was surely meant to have one."""


def parse_bytes(text: str, unit: str = "GB") -> int:
    """``"5GB"``, ``"512MiB"`` or ``"1000000"`` in bytes.

    Args:
        unit: what to suggest where a unit was forgotten.

    Raises:
        UsageError: it is none of these, less than a byte, more than 10^18, or so small a number that a unit must be
            missing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", text)
    factor = {name.lower(): factor for name, factor in _UNITS.items()}.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is no size; write it like 5GB, 512MiB or 1000000")
    size = float(match[1]) * factor
    if not 1 <= size <= _LARGEST:
        limit = "less than a byte" if size < 1 else f"more than {format_bytes(_LARGEST)}"
        raise UsageError(f"{shorten(text.strip())} is {limit}; write a size like 5GB, 512MiB or 1000000")
    count = int(size)
    if not match[2] and count < _LEAST_BARE:
        number = text.strip()
        unit_of = "byte" if number == "1" else "bytes"
        raise UsageError(f"{number} would be {number} {unit_of}; write it with a unit, like {number}{unit}")
    return count


def parse_ranks(text: str | None) -> list[int] | None:
    """``"0-3"`` or ``"0,2,5-6"`` as a list of ranks; ``None`` stays ``None``.

    Raises:
        UsageError: it is no list of ranks, or one of more than ``_MOST_RANKS``.
    """
    if text is None:
        return None
    ranks: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{text!r} is no list of ranks; write it like 0-3 or 0,2,5-6")
        more = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(ranks) + len(more) > _MOST_RANKS:
            raise UsageError(f"{text!r} names more than {_MOST_RANKS:,} ranks; name fewer")
        ranks += more
    return ranks
