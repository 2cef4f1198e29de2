"""Which rows of a batch begin alike, so that those that do are answered by one engine, one after the other.

An engine that has computed a prefix keeps it for a while (its prefix cache). Rows with the same one may stand anywhere
in the input. Nothing here decides what a row says, only who answers it and when; so no JSON is parsed for it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

from tpctl.client.jobs import Line

DEPTHS = tuple(64 << step for step in range(9))
"""Bytes of a prompt's beginning that may be what rows share: from one block of a KV cache to long documents."""

MOST_SHARES = 16
"""That the rows of a part are divided into, by what they begin with."""

_LOOKED_AT = 64  # bytes of a beginning
_FIELDS = 1024  # bytes of a line in which its prompt begins; elsewhere all of it counts as such
_PAYS = 0.05  # of all rows: those that begin like rows of an earlier part, less would not be noticed


@dataclass(frozen=True)
class Sharing:
    """How the rows of each part are divided: into so many ``shares``, by the first ``depth`` bytes of their prompts,
    which stand in ``field``; empty: in "prompt" or "messages"."""

    shares: int = 1
    depth: int = 0
    field: str = ""


UNSHARED = Sharing()


def beginning(raw: bytes, field: str = "") -> bytes:
    """A line from where its prompt or its conversation begins; ids and options that stand before differ from row to
    row."""
    return raw[_start(raw, field) :]


def share_of(raw: bytes, sharing: Sharing) -> int:
    """The share, from 0, that a line is in. It looks at a few bytes, spread over the depth: for documents that differ
    in none of them it would be no loss to be in one share."""
    start = _start(raw, sharing.field)
    return crc32(raw[start : start + sharing.depth : sharing.depth // _LOOKED_AT]) % sharing.shares


def _start(raw: bytes, field: str) -> int:
    if field:
        return max(raw.find(json.dumps(field, ensure_ascii=False).encode("utf-8", "replace"), 0, _FIELDS), 0)
    at = raw.find(b'"prompt"', 0, _FIELDS)
    if at < 0:
        at = raw.find(b'"messages"', 0, _FIELDS)
    return max(at, 0)


def order_of(lines: Sequence[Line], sharing: Sharing, share: int = 0) -> list[int]:
    """The places of a part's lines, counted from 0, in the order in which they are answered: share by share, and in
    each of them those that begin alike beside each other. Where few do, as in the input.

    Args:
        share: only of this one, from 1.
    """
    starts = [beginning(line.raw, sharing.field) for line in lines]
    if sharing.shares == 1:
        short = {start[: DEPTHS[0]] for start in starts}
        places = list(range(len(lines)))
        return places if len(lines) - len(short) < _PAYS * len(lines) else sorted(places, key=starts.__getitem__)
    found: list[list[int]] = [[] for _ in range(sharing.shares)]
    for place, line in enumerate(lines):
        found[share_of(line.raw, sharing)].append(place)
    wanted = found if not share else [found[share - 1]]
    return [place for one in wanted for place in sorted(one, key=starts.__getitem__)]


def sharing_of(raws: Sequence[bytes], part_rows: int, most: int, field: str = "") -> Sharing:
    """How rows should be divided, by those at the input's beginning.

    Shares pay where rows begin like others of other parts, which another engine may have answered. Where they only
    begin like their neighbours, or all are of a few kinds, each engine soon has what it needs.

    Args:
        part_rows: rows of a part, were they not divided.
        most: shares, at most.
        field: that prompts stand in, as of ``Sharing``.
    """
    texts = [beginning(raw, field) for raw in raws]
    best, saved = 0, 0
    for depth in DEPTHS:
        starts = [text[:depth] for text in texts if len(text) > depth]
        found = depth * (len(starts) - len(set(starts)))  # bytes that stood in an earlier row
        if found > saved:
            best, saved = depth, found
    if not best or most < 2:
        return Sharing(field=field)
    parts: defaultdict[bytes, set[int]] = defaultdict(set)
    for place, text in enumerate(texts):
        parts[text[:best]].add(place // part_rows)
    elsewhere = sum(len(found) - 1 for found in parts.values())
    if elsewhere < _PAYS * len(raws):
        return Sharing(field=field)
    return Sharing(min(most, MOST_SHARES), best, field)


def sizes(raws: Iterable[bytes], sharing: Sharing) -> tuple[int, ...]:
    """How many rows are in each share; none where there is but one."""
    if sharing.shares == 1:
        return ()
    counts = [0] * sharing.shares
    for raw in raws:
        counts[share_of(raw, sharing)] += 1
    return tuple(counts)
