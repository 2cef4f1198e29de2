"""JSON of a long answer, made piece by piece.

msgspec encodes in one call that lets no other thread run: of the log-probabilities of a prompt of 130,000 tokens for
half a second. Between two pieces the event loop has its turn.
"""

from __future__ import annotations

from typing import Any

import msgspec

encode = msgspec.json.encode

_ITEMS = 64
"""Of a list that are encoded together: of tokens with 20 likeliest each some 100 kB."""


def encode_pieces(value: Any, within: int = 1) -> bytes:
    """What ``msgspec.json.encode`` makes of a value of dicts by text, lists and plain ones.

    Args:
        within: how many lists, one in the other, have items that may be long themselves: the choices of an answer.
    """
    pieces: list[bytes] = []
    _add(value, pieces, within)
    return b"".join(pieces)


def _add(value: Any, pieces: list[bytes], within: int) -> None:
    if isinstance(value, dict) and value:
        sign = b"{"
        for name, one in value.items():
            pieces += (sign, encode(name), b":")
            _add(one, pieces, within)
            sign = b","
        pieces.append(b"}")
    elif isinstance(value, list) and value:
        sign = b"["
        if within or len(value) <= _ITEMS:
            for one in value:
                pieces.append(sign)
                _add(one, pieces, max(within - 1, 0))
                sign = b","
        else:
            for at in range(0, len(value), _ITEMS):
                pieces += (sign, encode(value[at : at + _ITEMS])[1:-1])
                sign = b","
        pieces.append(b"]")
    else:
        pieces.append(encode(value))
