"""A flipped bit in a manifest, found by undoing it.

The canonical text ends with its own SHA-256, so the one flip that makes text and digest fit again is the one that
happened: chance would have to find a collision.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

from tpctl.errors import shorten

SECONDS, MOST_SECONDS = 4.0, 20.0
"""Of computing, and by the clock, that looking for a flip may take: trying every bit of a large manifest would take for
ever."""

_MARK, _END, _HEX = b',\n "sha256":"', b'"\n}\n', 64
_TAIL = len(_MARK) + _HEX + len(_END)


class Budget:
    """``SECONDS`` of this process' computing from now on, unless the machine is so busy that it takes too long."""

    def __init__(self) -> None:
        self._computed, self._passed = time.process_time() + SECONDS, time.monotonic() + MOST_SECONDS

    def spent(self) -> bool:
        return time.process_time() > self._computed or time.monotonic() > self._passed


def undo_flip(raw: bytes, lines: Iterable[int], budget: Budget) -> str | None:
    """What the only flipped bit of the manifest ``raw`` belongs to, in words, if it is in one of ``lines`` (from 0) and
    found before ``budget`` is spent."""
    body, tail = raw[:-_TAIL] + b"\n}\n", raw[-_TAIL:]
    right = _MARK + sha256(body).hexdigest().encode() + _END
    if tail == right:  # whole, and yet none that tpctl writes: no flip did that
        return None
    if len(tail) == _TAIL and sum((a ^ b).bit_count() for a, b in zip(tail, right, strict=True)) == 1:
        return "its own sha256 has a flipped bit"
    recorded = tail[len(_MARK) : -len(_END)].decode("latin-1")
    starts = [0, *(match.end() for match in re.finditer(b"\n", raw))]
    for number in lines:
        start = starts[number]
        stop = min(starts[number + 1] if number + 1 < len(starts) else len(raw), len(body) - 2)
        before, rest = sha256(body[:start]), body[stop:]
        for place, line in _flipped(body[start:stop]):
            digest = before.copy()
            digest.update(line)
            digest.update(rest)
            if digest.hexdigest() == recorded:
                text = (body[:start] + line + rest).split(b"\n")
                return f"{path_of_line(text, number)} has a flipped bit (byte {start + place} of the file)"
            if budget.spent():
                return None
    return None


def _flipped(line: bytes) -> Iterator[tuple[int, bytes]]:
    """``line`` with each bit flipped that leaves a byte which JSON has, and its place."""
    for place, byte in enumerate(line):
        for bit in range(8):
            other = byte ^ (1 << bit)
            if other == 0x0A or 0x20 <= other < 0x7F or (byte >= 0x80 and other >= 0x80):
                yield place, line[:place] + bytes([other]) + line[place + 1 :]


def unreadable_line(raw: bytes) -> int | None:
    """The line (from 0) at which ``raw`` stops being JSON in UTF-8, if it does. ``RecursionError``: it is too deep."""
    try:
        json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return raw.count(b"\n", 0, error.start)
    except json.JSONDecodeError as error:
        return error.doc.count("\n", 0, error.pos)
    except ValueError:  # a number of too many digits
        return 0
    return None


def path_of_line(lines: Sequence[bytes], number: int) -> str:
    """What a line of a manifest is about, in words: a tensor and its rank, or the path of a field.

    Lines are indented by their depth, one space a level.
    """
    path: list[str] = []
    for line in lines[: number + 1]:
        depth = len(line) - len(line.lstrip(b" "))
        key = re.match(rb' *"((?:[^"\\]|\\.)*)', line)
        if depth:
            # An item of a list has no key of its own: its place stays empty.
            path = [*path, *[""] * depth][: depth - 1] + ([key[1].decode("utf-8", "replace")] if key else [])
    match path:
        case ["shards", rank, "tensors", name]:
            return f"{name} of rank {rank}"
        case ["shards", rank, *_]:
            return f"the list of part files of rank {rank}" if "parts" in path else f"the entry of rank {rank}"
        case ["extra", "tensors", name]:
            return f"{name} of the extra file"
    return shorten(".".join(key for key in path if key), 200) or "what stands around its fields"
