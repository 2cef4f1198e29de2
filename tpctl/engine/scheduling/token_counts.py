"""Which tokens a sequence has, and how often its answer has each: what penalties are made of."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Self


class Counted(NamedTuple):
    """Tokens without repeats, int64: ``seen`` of prompt and answer, ``answered`` of the answer alone, each of which is
    in it so many ``times``."""

    seen: array[int]
    answered: array[int]
    times: array[int]


class TokenCounts:
    """Counted on as a sequence grows: each of its tokens is looked at once, in whatever step it comes.

    A sequence's tokens only become more (a preempted one keeps them), so what has been counted holds; drafts, which may
    be thrown away, are counted in copies.

    Args:
        num_prompt_tokens: how many of the first tokens are the prompt's.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._length = 0
        self._known: set[int] = set()
        self._places: dict[int, int] = {}  # in ``answered``
        self._counted = Counted(array("q"), array("q"), array("q"))

    def follow(self, token_ids: Sequence[int]) -> Self:
        """Count what ``token_ids`` has behind those that it had before."""
        new = token_ids[self._length :]
        of_prompt = max(self._num_prompt_tokens - self._length, 0)
        seen, answered, times = self._counted
        unknown = [token for token in dict.fromkeys(new) if token not in self._known]
        self._known.update(unknown)
        seen.extend(unknown)
        for token in new[of_prompt:]:
            place = self._places.setdefault(token, len(answered))
            if place == len(answered):
                answered.append(token)
                times.append(0)
            times[place] += 1
        self._length = len(token_ids)
        return self

    def with_drafts(self, drafts: Sequence[int]) -> Counted:
        """What there will be once ``drafts`` have come, too. Not to be changed: without any it is what is kept."""
        if not drafts:
            return self._counted
        seen, answered, times = (one[:] for one in self._counted)
        seen.extend(token for token in dict.fromkeys(drafts) if token not in self._known)
        places: dict[int, int] = {}
        for token in drafts:
            place = self._places.get(token, places.get(token))
            if place is None:
                place = places[token] = len(answered)
                answered.append(token)
                times.append(0)
            times[place] += 1
        return Counted(seen, answered, times)
