"""Grammars over a model's vocabulary."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.client.deep_threads import said
from tpctl.errors import RequestError
from tpctl.wire.guide import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT, _KEPT_TEXT = 256, 1 << 21
"""Grammars that are kept ready, and characters of their texts, each of which takes some 60 bytes of memory at most. To
copy one takes microseconds."""


class Grammars:
    """Makes matchers, for several threads."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where the tokenizer is."""
        self._folder = folder
        self.vocab_size = 0
        self.end_ids: tuple[int, ...] = ()
        self._making = threading.Lock()  # of what follows
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()  # of what follows
        self._kept: OrderedDict[Guide, LLMatcher] = OrderedDict()

    def suit(self, vocab_size: int, end_ids: Sequence[int]) -> None:
        """Tell what model it is. To be called before the first request comes."""
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)

    def kept(self, guide: Guide) -> LLMatcher | None:
        """A grammar that was made before, to be copied; takes no time."""
        with self._lock:
            if (made := self._kept.get(guide)) is not None:
                self._kept.move_to_end(guide)
            return made

    def make(self, guide: Guide) -> LLMatcher:
        """A grammar, to be copied. Others may be made meanwhile.

        Raises:
            RequestError: it is none, or too large.
            CheckpointError: the tokenizer cannot be used for this.
        """
        from llguidance import LLMatcher

        from tpctl.client.grammar_text import grammar_text, parser_limits

        text = grammar_text(guide)
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
        made = LLMatcher(self._tokenizer, text, log_level=0, limits=parser_limits())
        if made.is_error():
            raise RequestError(f"{guide.name}: {said(made.get_error())}")
        with self._lock:
            self._kept[guide] = made
            self._kept.move_to_end(guide)
            while len(self._kept) > _KEPT or sum(len(one.text) for one in self._kept) > _KEPT_TEXT:
                self._kept.popitem(last=False)
        return made

    def matcher(self, guide: Guide) -> LLMatcher:
        """A grammar's beginning. Raises as ``make``."""
        return (self.kept(guide) or self.make(guide)).deep_copy()

    def _make_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        from tpctl.client.token_bytes import TokenBytes
        from tpctl.client.tokenizer import Tokenizer

        tokenizer = Tokenizer(self._folder)
        vocabulary = TokenBytes(tokenizer, self.vocab_size)
        ends = [id for id in self.end_ids if id < self.vocab_size]
        if not ends:
            raise RequestError("the model has no token that ends an answer, so an answer's form cannot be kept to")
        wrapped: Any = _Wrapped(vocabulary.tokens, vocabulary.special, vocabulary.encode, ends[0])
        return LLTokenizer(wrapped, eos_token=ends)


class _Wrapped:
    """A vocabulary as ``LLTokenizer`` takes it: by these names, called with text or bytes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: frozenset[int], encode: Callable[[bytes], list[int]], end: int
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self.eos_token_id = end
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.encode() if isinstance(text, str) else text)
