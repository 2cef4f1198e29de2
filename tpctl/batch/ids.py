"""Which ids of an input were used before, in eight bytes a line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

# As most files have it: the first field, and a text without escapes or a whole number.
_FIRST = re.compile(rb'\s*\{\s*"id"\s*:\s*(?:"([^"\\]*)"|(-?(?:0|[1-9]\d{0,17})))\s*[,}]')


def id_of(raw: bytes, number: int) -> str | int:
    """The id of line ``number``: its own, or where it has none, or none that can be one, the number."""
    if b'"id"' not in raw and b"\\u00" not in raw:  # the name could be written in escapes, too
        return number
    if found := _FIRST.match(raw):
        text, digits = found.groups()
        if digits is not None:
            return int(digits)
        try:
            return str(text, "utf-8")
        except UnicodeDecodeError:
            return number
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return number
    value = entry.get("id") if isinstance(entry, dict) else None
    return value if isinstance(value, str | int) and not isinstance(value, bool) else number


def keys_of(lines: Sequence[tuple[int, bytes]]) -> Keys:
    """A number for each line's id, equal for equal ids; unequal ones share one of 2**64 by accident."""
    return np.array([_number(id_of(raw, number)) for number, raw in lines], dtype=np.uint64)


def _number(id: str | int) -> int:
    if isinstance(id, int) and -(2**62) < id < 2**62:
        return id & (2**64 - 1)
    return int.from_bytes(blake2b(repr(id).encode(), digest_size=8).digest(), "little")


class Ids:
    """The ids seen so far, as sorted runs; a run is merged with the one before as soon as it is as long."""

    def __init__(self) -> None:
        self._runs: list[Keys] = []

    def add(self, keys: Keys) -> list[int]:
        """Take in the ids of further lines; the places in ``keys`` of those that were used before."""
        unique, first = np.unique(keys, return_index=True)
        repeated = np.ones(len(keys), dtype=bool)
        repeated[first] = False
        for run in self._runs:
            place = np.searchsorted(run, keys)
            repeated |= run[np.minimum(place, len(run) - 1)] == keys
        self.take(unique)
        return [int(place) for place in np.flatnonzero(repeated)]

    def take(self, keys: Keys) -> None:
        """Take in ids that nobody asks about."""
        run = np.sort(keys)
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.concatenate((self._runs.pop(), run))
            run.sort(kind="stable")
        if len(run):
            self._runs.append(run)
