"""Token ids to text, piece by piece, without ever showing half a character.

What comes out in pieces is exactly what decoding all ids at once gives, behind the prompt: the text of prompt and
answer together, less the text of the prompt. Two facts make that more than a loop: a character may be spread over
several tokens, and a token's text may depend on the one before it. sentencepiece writes a space before every word, and
decoding leaves out the one that nothing stands before; an answer's first word does stand behind something.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from tpctl.client.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_WINDOW = 64  # tokens whose text is held back before it counts as broken for good
_CONTEXT = 4  # tokens of a prompt that its answer is decoded behind; more where those have no text


class Detokenizer(Protocol):
    """Takes ids one at a time and gives the text they complete."""

    def push(self, id: int) -> str: ...

    def finish(self) -> str:
        """What was held back: the broken rest of a character, if any."""
        ...


def detokenizer(tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> Detokenizer:
    """The one that fits a tokenizer, for the text that follows the tokens ``prompt``."""
    if is_byte_level(tokenizer):
        return _ByteDetokenizer(tokenizer)
    return _WindowDetokenizer(tokenizer, prompt)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether every token is a string of bytes, whatever stands before it."""
    return type(tokenizer.backend.decoder).__name__ == "ByteLevel"


def is_byte_token(tokenizer: Tokenizer, id: int) -> bool:
    """Whether a token is one byte of sentencepiece's byte fallback."""
    return byte_of_token(tokenizer, id) is not None


def byte_of_token(tokenizer: Tokenizer, id: int) -> bytes | None:
    """The byte that such a token is; ``None``: it is none."""
    found = _BYTE_TOKEN.fullmatch(tokenizer.backend.id_to_token(id) or "")
    return None if found is None else bytes([int(found[1], 16)])


def context_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of ``prompt`` that what follows is decoded behind: some that have a text.

    They begin with no byte token, since a run of those is decoded as one.
    """
    ids: list[int] = []
    for id in reversed(prompt):
        if id in tokenizer.special_ids:
            continue
        ids.append(id)
        if len(ids) < _CONTEXT or is_byte_token(tokenizer, id):
            continue
        if len(ids) >= _LONGEST_WINDOW or tokenizer.decode(ids[::-1]):
            break
    return ids[::-1]


def decode_behind(tokenizer: Tokenizer, context: Sequence[int], text: str, ids: Sequence[int]) -> str:
    """``text``, which ``context`` decodes to, and what ``ids`` add to it."""
    whole = tokenizer.decode([*context, *ids])
    if whole.startswith(text):
        return whole
    return text + tokenizer.decode(ids)  # byte tokens at the border, of which the new ones spoil the whole run


class _ByteDetokenizer:
    """For byte-level BPE, where every token is a string of bytes and the text is their UTF-8.

    Most tokens are whole characters. Their texts are kept, since a server asks for thousands a second.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token = tokenizer.backend.id_to_token
        self._special = tokenizer.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._known = tokenizer.whole_texts
        self._within = False  # a character

    def push(self, id: int) -> str:
        if not self._within and (text := self._known.get(id)) is not None:
            return text
        if id in self._special:
            return ""
        token = self._token(id)
        text = self._utf8.decode(token_bytes(token)) if token is not None else ""
        before, self._within = self._within, bool(self._utf8.getstate()[0])
        if not before and not self._within:
            self._known[id] = text
        return text

    def finish(self) -> str:
        self._within = False
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other decoder: decode the newest tokens behind a few known ones, show what that adds.

    ids    … prompt, shown long ago … │ context, shown │ pending, not shown yet
                                      └──── decoded together ─────┘
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._context = context_of(tokenizer, prompt)
        self._context_text = tokenizer.decode(self._context) if self._context else ""
        self._pending: list[int] = []

    def push(self, id: int) -> str:
        if id in self._special:
            return ""
        self._pending.append(id)
        # A run of byte tokens is decoded as one, and one bad byte spoils all of it: wait until it ends.
        if is_byte_token(self._tokenizer, id):
            return ""
        text = self._decoded()
        if text.endswith(_REPLACEMENT) and len(self._pending) < _LONGEST_WINDOW:
            return ""
        return self._show(text)

    def finish(self) -> str:
        if not self._pending:
            return ""
        return self._show(self._decoded())

    def _decoded(self) -> str:
        return decode_behind(self._tokenizer, self._context, self._context_text, self._pending)

    def _show(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        if piece:  # tokens without text make no context: what follows them would look like a beginning
            self._context, self._pending = self._pending, []
            self._context_text = self._tokenizer.decode(self._context)
        return piece


def token_bytes(token: str) -> bytes:
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
