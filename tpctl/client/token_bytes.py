"""The bytes of every token of a vocabulary, as an answer's text gets them: what grammars are matched against."""

from __future__ import annotations

from collections.abc import Sequence

from tpctl.client.detokenizer import byte_of_token, is_byte_level, token_bytes
from tpctl.client.panics import guarded
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError

_SOME = 8192  # tokens that are decoded together


class TokenBytes:
    """A tokenizer's vocabulary in bytes, of ``size`` tokens, which may be more than it knows.

    Attributes:
        tokens: of each id its bytes; of control tokens their names, of ids that stand for no text none.
        special: ids that no text is made of.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = _all_bytes(tokenizer, size)
        self.special = frozenset(id for id in tokenizer.special_ids if id < size)
        for id in self.special:
            self.tokens[id] = (tokenizer.backend.id_to_token(id) or "").encode("utf-8", "replace")
        self._ids = {data: id for id, data in reversed([*enumerate(self.tokens)]) if data and id not in self.special}
        self._longest = max(map(len, self._ids), default=1)

    def encode(self, data: bytes) -> list[int]:
        """Tokens whose bytes are ``data``: those that the tokenizer itself takes where they are, else the longest."""
        for before in ("", "\n"):
            ids = self._encoded(before + data.decode(errors="replace"), before.encode(), data)
            if ids is not None:
                return ids
        return self._longest_first(data)

    def _encoded(self, text: str, before: bytes, data: bytes) -> list[int] | None:
        """Of the tokens of ``text`` those behind ``before`` (and a space that some tokenizers put in front)."""
        ids = guarded(
            lambda: self._tokenizer.backend.encode(text, add_special_tokens=False).ids,
            lambda said: CheckpointError(said),
            quiet=False,
        )
        if any(id >= len(self.tokens) or id in self.special for id in ids):
            return None
        seen, at = b"", 0
        while before and seen.lstrip(b" ") != before and at < len(ids):
            seen += self.tokens[ids[at]]
            at += 1
        return ids[at:] if b"".join(self.tokens[id] for id in ids[at:]) == data else None

    def _longest_first(self, data: bytes) -> list[int]:
        ids = []
        at = 0
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                if (id := self._ids.get(data[at : at + length])) is not None:
                    ids.append(id)
                    at += length
                    break
            else:  # a byte that no token has: what follows cannot be written
                return ids
        return ids


def _all_bytes(tokenizer: Tokenizer, size: int) -> list[bytes]:
    backend = tokenizer.backend
    names = [backend.id_to_token(id) for id in range(size)]
    if is_byte_level(tokenizer):
        return [b"" if name is None else token_bytes(name) for name in names]
    found = [b""] * size
    plain = []
    for id, name in enumerate(names):
        if name is None or id in tokenizer.special_ids:
            continue
        if (byte := byte_of_token(tokenizer, id)) is not None:
            found[id] = byte
        else:
            plain.append(id)
    # Behind a text, as answers are: a decoder may leave out the space that begins one.
    context, text = _context(tokenizer, plain)
    for start in range(0, len(plain), _SOME):
        ids = plain[start : start + _SOME]
        for id, whole in zip(ids, _decoded(tokenizer, [[context, id] for id in ids]), strict=True):
            if whole.startswith(text):
                found[id] = whole[len(text) :].encode("utf-8", "replace")
    return found


def _context(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, str]:
    """A token with a text, and that."""
    for id in ids:
        text = tokenizer.decode([id])
        if text.isascii() and text.isalnum():
            return id, text
    raise CheckpointError("the tokenizer has no token of letters, so no grammar can be followed with it")


def _decoded(tokenizer: Tokenizer, ids: list[list[int]]) -> list[str]:
    return guarded(
        lambda: [str(text) for text in tokenizer.backend.decode_batch(ids, skip_special_tokens=True)],
        lambda said: CheckpointError(f"the tokenizer cannot decode its own tokens: {said}"),
    )
