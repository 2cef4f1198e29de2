"""A grammar that an answer follows, token by token."""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tpctl.client.deep_threads import said
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.uint32]
ALL = 0xFFFFFFFF


class Walk:
    """A grammar, and how far an answer has come in it. ``after``: the token that it begins behind.

    Attributes:
        begun: whether the grammar was given any token.
        hopeless: whether the grammar has failed before it was given any token, as it will for every request.
    """

    def __init__(self, matcher: LLMatcher, after: int | None) -> None:
        self._matcher = matcher
        self._after = after
        self._taken = 0  # tokens of the answer
        self.begun = False
        self.hopeless = False

    def mask(self, item: ScheduledSequence, words: Words) -> str | None:
        """Set the bits of tokens that may come next, or say why none may."""
        sequence, matcher = item.sequence, self._matcher
        ends = [id for id in sequence.stop_token_ids if id < 32 * len(words)]
        self._follow(sequence)
        if self._after is not None:
            words[:] = ALL
            _clear(words, ends)  # a thought is no answer
            return None
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            self.hopeless = not self.begun
            return _reason(matcher)
        if matcher.is_stopped():
            words[:] = 0
        if matcher.is_accepting():
            _set(words, ends)
        if item.num_generated < sequence.params.min_tokens:
            kept = words.copy()
            _clear(words, ends)
            if not words.any():  # the grammar has no more to give
                words[:] = kept
        return None if words.any() else "the grammar lets nothing follow, and the answer may not end"

    def _follow(self, sequence: Sequence) -> None:
        answer = sequence.token_ids[sequence.num_prompt_tokens + self._taken :]
        self._taken += len(answer)
        if self._after is not None:
            if self._after not in answer:
                return
            answer = answer[answer.index(self._after) + 1 :]
            self._after = None
        for token in answer:
            self.begun = True
            self._matcher.consume_token(token)


def _reason(matcher: LLMatcher) -> str:
    """What a matcher that cannot go on says, in words."""
    message = str(matcher.get_error()).partition("\n<")[0]
    if message.startswith("NoExtension"):
        return "the grammar has no text that could follow, and the answer may not end"
    return f"the grammar takes more than its limits allow: {said(message)}"


def _set(words: Words, ids: SequenceType[int]) -> None:
    for id in ids:
        words[id >> 5] |= np.uint32(1 << (id & 31))


def _clear(words: Words, ids: SequenceType[int]) -> None:
    for id in ids:
        words[id >> 5] &= np.uint32(ALL ^ (1 << (id & 31)))
