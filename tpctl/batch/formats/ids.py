"""Which ids of an input were used before, in eight bytes a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]


Find = Callable[[bytes, int], str | int]
"""Finds the id of a line by its text and its number."""


def id_finder(field: str = "id", *, needed: bool = False) -> Find:
    """What finds ids in ``field``, mostly without reading lines as JSON.

    A line has its own id, or where it has none, or none that can be one, its number.

    Args:
        needed: a line without one is not called by its number.
    """
    name = json.dumps(field, ensure_ascii=False).encode()
    # The name could be written in escapes, too.
    escape = b"\\u00" if re.fullmatch(r"[\w .-]+", field, re.ASCII) else b"\\"
    # As most files have it: the first field, and a text without escapes or a whole number.
    first = rb'\s*\{\s*%s\s*:\s*(?:"([^"\\]*)"|(-?(?:0|[1-9]\d{0,17})))\s*[,}]' % re.escape(name)
    match = re.compile(first).match

    def find(raw: bytes, number: int) -> str | int:
        if name not in raw and escape not in raw:
            return f"\0{number}" if needed else number
        if found := match(raw):
            text, digits = found.groups()
            if digits is not None:
                return int(digits)
            try:
                return str(text, "utf-8")
            except UnicodeDecodeError:
                return f"\0{number}" if needed else number
        value = None
        with suppress(ValueError, RecursionError):
            entry = json.loads(raw)
            value = entry.get(field) if isinstance(entry, dict) else None
        if isinstance(value, str | int) and not isinstance(value, bool):
            return value
        return f"\0{number}" if needed else number

    return find


id_of = id_finder()


def keys_of(lines: Iterable[tuple[int, bytes]], find: Find = id_of) -> Keys:
    """A number for each line's id, equal for equal ids; unequal ones share one of 2**64 by accident."""
    return np.array([key_of(find(raw, number)) for number, raw in lines], dtype=np.uint64)


def key_of(id: str | int) -> int:
    """The number for an id."""
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
