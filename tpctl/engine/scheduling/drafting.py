"""The drafts of a step: how many it has room for, which are computed, and what becomes of them.

What is proposed, and how much of it pays, is in ``engine.scheduling.speculation``; here is what scheduling adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceType

from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.limits import Limits
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import Speculation
from tpctl.engine.scheduling.states import StatePool


class Drafting:
    """Of one scheduler, whose sequences that run and that wait these are.

    Args:
        rope_offset: which rotary table rotates all keys of a sequence of so many tokens.
    """

    def __init__(
        self,
        speculation: Speculation,
        blocks: BlockManager,
        states: StatePool | None,
        running: Mapping[str, Sequence],
        waiting: SequenceType[Sequence],
        limits: Limits,
        rope_offset: Callable[[int], int],
    ) -> None:
        self.speculation = speculation
        self.rope_offset = rope_offset
        self._blocks, self._states = blocks, states
        self._running, self._waiting = running, waiting
        self._max_num_seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        rows = speculation.most_rows
        self._most = tokens if rows is None else min(rows, tokens)

    def most(self, requests: int) -> int:
        """How many tokens of a step may be proposed, so that each sequence that may run has its own."""
        return max(0, self._most - min(self._max_num_seqs, requests))

    def propose(self, sequence: Sequence, tokens: int, most: int) -> tuple[int, ...]:
        """At most ``most`` drafts behind the ``tokens`` of a running sequence that the step computes."""
        if sequence.num_in_flight or tokens != 1 or sequence.num_uncomputed_tokens != 1 or sequence.params.guide:
            return ()
        length = len(sequence.token_ids)
        most = min(most, sequence.max_num_tokens - length - 1)
        if self._states is not None:
            most = min(most, self._states.room_for_drafts(len(self._waiting)))
        drafts = self.speculation.propose(sequence, most, len(self._running))
        # Keys are rotated by one table: the step that leaves its range computes no more than it has to.
        return drafts if self.rope_offset(length + len(drafts)) == sequence.rope_offset else ()

    def propose_ahead(self) -> bool:
        """Propose for all sequences whose next token is under way, to learn from it; whether more is likely to be
        proposed with these tokens than without: then they are worth waiting for."""
        waited = [s for s in self._running.values() if s.num_in_flight == 1 and s.num_uncomputed_tokens == 1]
        more = [self.speculation.propose_ahead(s, len(self._running)) for s in waited]  # all, since it learns by it
        return any(more)

    def learn(self, item: ScheduledSequence, came: SequenceType[int]) -> None:
        """Of an item's drafts those that came are computed; the others are not any more."""
        sequence = item.sequence
        if item.drafts:
            sequence.num_computed_tokens = item.places.start + len(came) - 1
            self._blocks.register(sequence)
            if self._states is not None:
                self._states.settle(sequence, max(0, len(came) - 1))
        self.speculation.learn(sequence, item.drafts, came)

    def grow_ahead(self, items: list[ScheduledSequence]) -> None:
        """Blocks for guesses behind a step's tokens, too, if that leaves every running sequence one for tokens."""
        if not self.speculation.ahead:
            return
        for item in items:
            wanted = min(item.sequence.num_computed_tokens + self.speculation.ahead, item.sequence.max_num_tokens)
            self._blocks.grow(item.sequence, wanted, self._running.values())
