"""What a step has left while it is put together, and what it has chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpctl.engine.scheduling.scheduled import ScheduledSequence


@dataclass
class Step:
    """What a step has left (tokens in all and of prompts, parts of prompts, drafts) and has chosen so far."""

    budget: int
    prefill: int
    chunks: int
    drafts: int
    items: list[ScheduledSequence] = field(default_factory=list)
    chosen: set[str] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        """Whether part of a prompt can be added."""
        return self.budget > 0 and self.prefill > 0 and self.chunks > 0

    def room(self, tokens: int) -> int:
        """How many of so many uncomputed tokens of a sequence there is room for."""
        if tokens <= 1:
            return min(tokens, self.budget)
        return min(tokens, self.budget, self.prefill) if self.chunks else 0

    def take(self, id: str, tokens: int, drafts: int, *, part: bool) -> None:
        """Have less left, by what a sequence computes; ``part``: these are tokens of a prompt."""
        self.chosen.add(id)
        self.budget -= tokens + drafts
        self.drafts -= drafts
        if part:
            self.prefill -= tokens
            self.chunks -= 1
