"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tpctl.engine.scheduling.sequence import Sequence


class StateUse(NamedTuple):
    """Where recurrent layers have a sequence's state: its own ``slot``, and the ``source`` that it goes on from
    (``None``: it begins). ``keeps``: (after so many of the step's tokens, the slot that it is copied to), in order."""

    slot: int
    source: int | None
    keeps: tuple[tuple[int, int], ...] = ()


class ScheduledSequence(NamedTuple):
    """``num_new_tokens`` of ``sequence``, from token ``start``; ``samples`` when the last one yields a new token.
    ``state``: of a model with recurrent layers. ``drafts``: the last of the new tokens, which are proposed to follow
    those that are known; each of them, and the token before them, yields a token."""

    sequence: Sequence
    start: int
    num_new_tokens: int
    samples: bool
    state: StateUse | None = None
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position that follows: that of the last token it samples."""
        return self.start + self.num_new_tokens

    @property
    def token_ids(self) -> list[int]:
        """The new tokens, as far as they are known."""
        return [*self.sequence.token_ids[self.start : self.end - len(self.drafts)], *self.drafts]

    @property
    def places(self) -> range:
        """The positions of the tokens it samples."""
        return range(self.end - len(self.drafts), self.end + 1) if self.samples else range(0)

    @property
    def num_generated(self) -> int:
        """Tokens that were generated before the first one it samples."""
        return self.end - len(self.drafts) - self.sequence.num_prompt_tokens

    @property
    def scored(self) -> range:
        """The places of tokens that it scores: those of the prompt that follow the ones it computes."""
        sequence = self.sequence
        first = sequence.scored_from
        if first is None:
            return range(0)
        return range(max(self.start + 1, first), min(self.end + 1, sequence.num_prompt_tokens))

    @property
    def is_decode(self) -> bool:
        """One new token that yields the next one. (A prompt's last single token looks the same, and is.)"""
        return self.samples and self.num_new_tokens == 1


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's work: decodes first, then prefill chunks. ``paced``: whether prompts had a budget of their own."""

    items: list[ScheduledSequence]
    num_decodes: int
    paced: bool = False

    @property
    def num_prefills(self) -> int:
        return len(self.items) - self.num_decodes

    @cached_property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.items)

    @cached_property
    def scores(self) -> bool:
        """Whether any tokens are scored."""
        return any(item.scored for item in self.items)

    @cached_property
    def sampled(self) -> list[ScheduledSequence]:
        """The items that yield a token, in row order."""
        return [item for item in self.items if item.samples]

    @cached_property
    def num_sampled(self) -> int:
        """How many tokens they yield."""
        return len(self.sampled) + sum(len(item.drafts) for item in self.sampled)

    @cached_property
    def only_answers(self) -> bool:
        """Whether nothing of a prompt is computed: of each sequence its newest token, and drafts."""
        return all(item.samples and item.num_new_tokens == 1 + len(item.drafts) for item in self.items)

    @cached_property
    def has_drafts(self) -> bool:
        """Whether some of the tokens are proposed."""
        return any(item.drafts for item in self.items)
