"""What a body becomes in memory, told from its JSON before that is decoded.

Decoding takes longest, and most memory, where JSON is many small values: 16 MiB of ``[],[],…`` take 1.4 s and 380 MB.
msgspec decodes in one call that lets no other thread run, so a thread of its own would not help the event loop. Signs
are counted by methods of ``bytes`` instead, of 16 MiB in 0.01 to 0.1 s. Numbers of hundreds of digits take long, too,
up to 0.8 s for 16 MiB, and say nothing that a float64 holds: none has more than ``MOST_DIGITS`` in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tpctl.serve.errors import ApiError

MOST_VALUES = 1 << 18
"""Strings, arrays and objects of a body: some times those of 2,048 messages and 1,024 tools; decoded in 0.1 s."""

MOST_DIGITS = 64
"""In a row, of a number: more than a float64 or any integer that is asked for has."""

_STRING, _CONTAINER, _ITEM = 64, 200, 40
"""Bytes of each beside a string's characters, as CPython has them: of a container with one item, and of each item more,
with the number that it may be."""

_SIGNS = bytes(set(range(256)) - set(b'"[{,'))
_DIGITS = bytes(48 if 48 <= sign < 58 else 32 for sign in range(256))
_WIDEST = [bytes([lead]) for lead in range(0xF0, 0xF5)] + [b"\\ud", b"\\uD"]
"""What characters that take 4 bytes begin with, in UTF-8 and as escapes."""


@dataclass(frozen=True)
class Weight:
    """How many values a body has, and ``size``, about how many bytes they take decoded, rather more than less."""

    strings: int
    containers: int
    size: int

    @classmethod
    def of(cls, raw: bytes) -> Self:
        """Of JSON in UTF-8; of what is none, anything.

        Raises:
            ApiError: it has more than ``MOST_VALUES``, or a number of more than ``MOST_DIGITS``.
        """
        unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
        signs = unescaped.translate(None, _SIGNS)
        _check(strings := signs.count(b'"') // 2)  # before each makes a piece
        outside = b"".join(signs.split(b'"')[::2])
        if b"0" * (MOST_DIGITS + 1) in b" ".join(unescaped.split(b'"')[::2]).translate(_DIGITS):
            raise ApiError(400, f"the body has a number of more than {MOST_DIGITS} digits in a row; round it")
        containers = outside.count(b"[") + outside.count(b"{")
        _check(strings + containers)
        items = outside.count(b",")
        size = _width(raw) * len(raw) + _STRING * strings + _CONTAINER * containers + _ITEM * items
        return cls(strings, containers, size)


def _check(values: int) -> None:
    if values > MOST_VALUES:
        raise ApiError(
            413,
            f"the body has {values} strings, arrays and objects or more, but at most {MOST_VALUES} are read; "
            "send it in pieces",
            code="body_too_large",
        )


def _width(raw: bytes) -> int:
    """Bytes of memory that one of a string may take: CPython gives all characters what the widest needs."""
    if any(sign in raw for sign in _WIDEST):
        return 4
    return 1 if raw.isascii() and b"\\u" not in raw else 2
