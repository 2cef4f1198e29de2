"""Token ids to text, piece by piece, without ever showing half a character.

What comes out in pieces is exactly what decoding all ids at once gives. Two facts make that more than a loop:
a character may be spread over several tokens, and a token's text may depend on the one before it (the space
that sentencepiece puts before a word, but not before the first).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Protocol

from tpctl.client.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_WINDOW = 64  # tokens whose text is held back before it counts as broken for good


class Detokenizer(Protocol):
    """Takes ids one at a time and gives the text they complete."""

    def push(self, id: int) -> str: ...

    def finish(self) -> str:
        """What was held back: the broken rest of a character, if any."""
        ...


def detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    """The one that fits a tokenizer."""
    if type(tokenizer.backend.decoder).__name__ == "ByteLevel":
        return _ByteDetokenizer(tokenizer)
    return _WindowDetokenizer(tokenizer)


class _ByteDetokenizer:
    """For byte-level BPE, where every token is a string of bytes and the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token = tokenizer.backend.id_to_token
        self._special = tokenizer.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        if id in self._special:
            return ""
        token = self._token(id)
        return self._utf8.decode(_token_bytes(token)) if token is not None else ""

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other decoder: decode the newest tokens behind a few known ones, show what that adds.

    ids    … shown long ago … │ context, shown │ pending, not shown yet
                              └──── decoded together ─────┘
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, id: int) -> str:
        if id in self._special:
            return ""
        self._pending.append(id)
        # A run of byte tokens is decoded as one, and one bad byte spoils all of it: wait until it ends.
        if _BYTE_TOKEN.fullmatch(self._tokenizer.backend.id_to_token(id) or ""):
            return ""
        text = self._tokenizer.decode([*self._context, *self._pending])
        if text.endswith(_REPLACEMENT) and len(self._pending) < _LONGEST_WINDOW:
            return ""
        return self._show(text)

    def finish(self) -> str:
        if not self._pending:
            return ""
        return self._show(self._tokenizer.decode([*self._context, *self._pending]))

    def _show(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        if piece:  # tokens without text make no context: what follows them would look like a beginning
            self._context, self._pending = self._pending, []
            self._context_text = self._tokenizer.decode(self._context)
        return piece


def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token with other characters stands for itself."""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:
        return token.encode()


def _byte_of() -> dict[str, int]:
    """The character that GPT-2's byte-level BPE writes for each byte, the other way round.

    Printable Latin-1 characters stand for their own code; the 68 others got the code points from 256 on, in order.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def decode_in_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """All pieces of a finished answer, one a token and one for the end; joined they are its text."""
    stream = detokenizer(tokenizer)
    return [*(stream.push(id) for id in ids), stream.finish()]
