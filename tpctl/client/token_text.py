"""The text of single tokens where they stand, for the logprobs of an answer's tokens and of those not chosen."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tpctl.client.detokenizer import byte_of_token, context_of, decode_behind, is_byte_level, is_byte_token, token_bytes
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.report import TokenLogprob

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenTexts(Protocol):
    """What each token adds to the text before it.

    A character that is spread over several tokens is the text of the last of them, and the others have none; so the
    texts of an answer's tokens, joined, are the answer. Control tokens, which an answer's text leaves out, are shown
    as they are written.
    """

    def peek(self, id: int) -> str:
        """The text of the token ``id`` if it came next."""
        ...

    def push(self, id: int) -> str:
        """The text of the token ``id``, which does come next."""
        ...

    def own(self, id: int) -> bytes | None:
        """The bytes of the token ``id`` itself if it came next; ``None``: those of its text."""
        ...


def token_texts(tokenizer: Tokenizer, prompt: Sequence[int]) -> TokenTexts:
    """For the tokens that follow ``prompt``."""
    return _ByteTexts(tokenizer) if is_byte_level(tokenizer) else _ContextTexts(tokenizer, prompt)


def logprob_rows(texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities of tokens that follow each other, and of others in their places, with their texts.

    A token whose bytes are not those of its text, since it is a part of a character, has ``bytes``, too.
    """
    found = []
    for id, at in zip(token_ids, logprobs, strict=False):
        others = [_row(texts, other, value, texts.peek) for other, value in at.top]
        found.append({**_row(texts, id, at.logprob, texts.push), "top": others})
    return found


def _row(texts: TokenTexts, id: int, logprob: float, text_of: Callable[[int], str]) -> dict[str, Any]:
    own, text = texts.own(id), text_of(id)
    row = {"id": id, "token": text, "logprob": logprob}
    return row if own is None or own == text.encode("utf-8", "replace") else {**row, "bytes": list(own)}


def prompt_rows(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> list[dict[str, Any]]:
    """A prompt's tokens; of the first one no more is known than its text."""
    texts = token_texts(tokenizer, ())
    first = {"id": token_ids[0], "token": texts.push(token_ids[0]), "logprob": None, "top": []}
    return [first, *logprob_rows(texts, token_ids[1:], logprobs)]


class _ByteTexts:
    """For byte-level BPE: a token's bytes behind those of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def peek(self, id: int) -> str:
        state = self._utf8.getstate()
        text = self.push(id)
        self._utf8.setstate(state)
        return text

    def push(self, id: int) -> str:
        token = self._tokenizer.backend.id_to_token(id)
        if token is None or id in self._tokenizer.special_ids:
            return token or ""
        return self._utf8.decode(token_bytes(token))

    def own(self, id: int) -> bytes | None:
        token = self._tokenizer.backend.id_to_token(id)
        return None if token is None or id in self._tokenizer.special_ids else token_bytes(token)


class _ContextTexts:
    """For every other decoder: decode a token behind those before it, and see what that adds."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._context: list[int] = []
        self._text = ""
        self._pending: list[int] = []  # bytes of a character that is not finished
        self._settle(prompt)

    def peek(self, id: int) -> str:
        if id in self._special:
            return self._tokenizer.backend.id_to_token(id) or ""
        text = decode_behind(self._tokenizer, self._context, self._text, [*self._pending, id])[len(self._text) :]
        unfinished = is_byte_token(self._tokenizer, id) and _REPLACEMENT in text
        return "" if unfinished else text

    def push(self, id: int) -> str:
        text = self.peek(id)
        if id not in self._special:
            self._pending.append(id)
            if text:
                self._settle([*self._context, *self._pending])
        return text

    def own(self, id: int) -> bytes | None:
        if id in self._special:
            return None
        if (byte := byte_of_token(self._tokenizer, id)) is not None or not self._pending:
            return byte
        # Its text begins with what is shown of the character that it breaks off.
        alone = decode_behind(self._tokenizer, self._context, self._text, [id])[len(self._text) :]
        return alone.encode("utf-8", "replace")

    def _settle(self, ids: Sequence[int]) -> None:
        self._context, self._pending = context_of(self._tokenizer, ids), []
        self._text = self._tokenizer.decode(self._context) if self._context else ""
