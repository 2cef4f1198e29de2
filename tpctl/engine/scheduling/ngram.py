"""Prompt lookup: what followed the last tokens when they came before is proposed to follow them again.

Answers that edit code, quote or sum up repeat long runs of their prompt, and of themselves (Saxena, "Prompt Lookup
Decoding", 2023). No model is asked: a table says where a run of tokens was last seen.
"""

from __future__ import annotations

from typing import NamedTuple

SIZES = (4, 2)
"""Runs that are looked for, the longest first. Of single tokens hardly one in ten is followed by the same again."""
MOST_COMPARED = 8
"""A match is told from others by its length up to here."""


class Match(NamedTuple):
    """``tokens`` are proposed, since the last ``length`` tokens stood before them."""

    tokens: list[int]
    length: int


class NgramIndex:
    """Where each run of ``SIZES`` tokens of a sequence was last seen. It follows the sequence as that grows."""

    def __init__(self) -> None:
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in SIZES]
        self._indexed = 0  # behind so many tokens what follows is known, and noted

    def find(self, token_ids: list[int], most: int) -> Match | None:
        """What may follow ``token_ids``: at most ``most`` tokens; ``None`` where their end was never seen before.

        A run that reaches the end goes on with what it has proposed, as text does that repeats itself.
        """
        end = len(token_ids)
        self._follow(token_ids)
        for size, places in zip(SIZES, self._places, strict=True):
            place = places.get(tuple(token_ids[-size:])) if end >= size else None
            if place is not None:
                tokens: list[int] = []
                for at in range(place, place + most):
                    tokens.append(token_ids[at] if at < end else tokens[at - end])
                return Match(tokens, _common(token_ids, place, size))
        return None

    def _follow(self, token_ids: list[int]) -> None:
        """Note all runs but the one at the end, which nothing follows yet."""
        for size, places in zip(SIZES, self._places, strict=True):
            for place in range(max(self._indexed, size), len(token_ids)):
                places[tuple(token_ids[place - size : place])] = place
        self._indexed = len(token_ids)


def _common(token_ids: list[int], place: int, length: int) -> int:
    """How many tokens before ``place`` are those at the end, of which ``length`` are known to be."""
    end = len(token_ids)
    while length < min(MOST_COMPARED, place) and token_ids[place - 1 - length] == token_ids[end - 1 - length]:
        length += 1
    return length
