"""The books of recurrent layers' states: which slot belongs to whom, and which states are kept for prefixes.

A slot holds one state in all recurrent layers. A running sequence has one of its own, from its admission to its
release. The others keep states of prefixes, under the hash of the last block that a state has seen: a sequence with
that prefix goes on from there, if the prefix's blocks are still there, too. What is kept gives way to running sequences
and to newer ones, least recently used first.

Unlike keys and values, which are there for every token, a state is of one place, and it costs as much as hundreds of
tokens. So states are kept only where somebody is likely to go on from:

    the last block border of a prompt               a prompt that is repeated, or goes on
    the border to which others' blocks were found   where prompts part, found by the second that comes (Pan et al.,
                                                    "Marconi: Prefix Caching for the Era of Hybrid LLMs", 2024)
    the last block border of an answer so far       the next turn of a conversation; each takes the place of the last

Of a step with drafts the state in front of each of them is copied, too, until it is known which of them are the answer:
that in front of the first one that is not becomes the sequence's own. There are as many drafts as slots are free for.
Kernels leave no state where they read one, so there the state behind the last draft has a slot of its own as well.

The step that computes those tokens copies the state on its way (``StateUse.keeps``), so no step ends early for it. What
a step reads is not given away in it, and what it keeps is found from the next one on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceType

from tpctl.engine.scheduling.block_manager import BlockManager, Prefix
from tpctl.engine.scheduling.scheduled import StateUse
from tpctl.engine.scheduling.sequence import Sequence


class StatePool:
    """Hands out the slots 0 to ``num_slots - 1``.

    Args:
        blocks: whose hashes states are kept under.
        apart: a step with drafts leaves none of its states in the slot that it goes on from.
    """

    def __init__(self, num_slots: int, blocks: BlockManager, *, apart: bool = False) -> None:
        self.num_slots = num_slots
        self._blocks, self.apart = blocks, apart
        self._free = list(reversed(range(num_slots)))
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._new: dict[bytes, int] = {}  # kept by the step that is being scheduled
        self._read: set[bytes] = set()  # what that step goes on from
        self._drafts: dict[str, list[int]] = {}  # of a sequence with drafts under way: the slots of the states before

    def begin(self) -> None:
        """Before each step."""
        self._kept.update(self._new)
        self._new.clear()
        self._read.clear()

    def match_prefix(self, sequence: Sequence) -> Prefix:
        """The longest cached beginning of ``sequence`` behind which there is a state, too."""
        return self._blocks.match_prefix(sequence, self._kept)

    @property
    def has_room(self) -> bool:
        """Whether a sequence can be given a slot."""
        return bool(self._free) or len(self._kept) > len(self._read)

    def admit(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give a sequence a slot, and what it goes on from: the state behind its ``prefix``."""
        assert sequence.state_slot is None and self.has_room
        sequence.state_source, source = None, prefix.digest or None
        if source is not None:
            self._kept.move_to_end(source)
            sequence.state_source = self._kept[source]
        others = self._read | ({source} if source is not None else set())
        slot = self._take(others)
        if slot is None:  # there is no other: what is kept becomes its own
            slot = self._take(self._read)
        elif source is not None:
            self._read.add(source)
        sequence.state_slot = slot

    def room_for_drafts(self, waiting: int) -> int:
        """How many drafts a sequence may have, so that as many others can be admitted beside it."""
        kept = len(self._kept) - sum(digest in self._kept for digest in self._read)
        return max(0, len(self._free) + kept - waiting - self.apart)

    def use(self, sequence: Sequence, start: int, end: int, drafts: int = 0) -> StateUse:
        """What a step does with the state of ``sequence``, of which it computes the tokens ``start`` to ``end``; behind
        these there are so many ``drafts``."""
        slot, source = sequence.state_slot, sequence.state_source
        assert slot is not None
        sequence.state_source = slot
        before = []
        if drafts:
            slots = [self._take(self._read) for _ in range(drafts + self.apart)]
            copies = self._drafts[sequence.id] = [slot for slot in slots if slot is not None]
            assert len(copies) == len(slots), "more drafts than there is room for"
            before = list(enumerate(copies, end - start))
            if self.apart:  # what is at a block's border is kept when it is known how many hold
                return StateUse(slot, source, tuple(before))
        if not self._blocks.enable_prefix_caching or sequence.alone:
            return StateUse(slot, source, tuple(before))
        size = self._blocks.block_size
        keeps: dict[int, int | None] = {}
        for border in dict.fromkeys(sequence.borders):
            if start < border * size <= end:
                keeps[border * size - start] = self._keep(self._blocks.digest(sequence, border))
        answered = end > sequence.num_prompt_tokens and end == sequence.num_hashed_blocks * size
        if answered and end - start not in keeps:
            keeps[end - start] = self._move_on(sequence)
        kept = [(after, copy) for after, copy in keeps.items() if copy is not None]
        return StateUse(slot, source, tuple(sorted(kept + before)))

    def settle(self, sequence: Sequence, accepted: int) -> None:
        """So many of the drafts under way are the answer; its tokens are known, and its blocks registered."""
        copies = self._drafts.pop(sequence.id, [])
        assert sequence.state_slot is not None
        if accepted < len(copies):
            sequence.state_slot, copies[accepted] = copies[accepted], sequence.state_slot
            sequence.state_source = sequence.state_slot
        size, first = self._blocks.block_size, sequence.num_computed_tokens - accepted
        digest, behind = sequence.block_hash, sequence.num_hashed_blocks * size - first
        # A border among the accepted ones: the state there has been copied, and is kept as ``use`` would have.
        if 0 <= behind < accepted and digest not in self._kept and digest not in self._new:
            last = self._kept.pop(sequence.state_digest, None)
            self._kept[digest], sequence.state_digest = copies.pop(behind), digest
            copies += [] if last is None else [last]
        self._free += copies

    def release(self, sequence: Sequence) -> None:
        """Take back the slot of a sequence that had been admitted."""
        assert sequence.state_slot is not None
        self._free += [sequence.state_slot, *self._drafts.pop(sequence.id, [])]
        sequence.state_slot = sequence.state_source = None
        sequence.state_digest = b""

    def forget(self, sequence: Sequence) -> None:
        """Let nobody go on from a state of these tokens any more."""
        for digest in self._blocks.digests(sequence):
            for kept in (self._kept, self._new):
                if digest in kept:
                    self._free.append(kept.pop(digest))

    def check_integrity(self, sequences: SequenceType[Sequence] = ()) -> None:
        """Check that ``sequences``, all that have slots, and kept states account for every slot that is not free.

        Raises:
            AssertionError: a slot is lost, or has two uses.
        """
        assert not self._kept.keys() & self._new.keys(), "a state is kept twice"
        kept = (*self._kept.values(), *self._new.values(), *(slot for some in self._drafts.values() for slot in some))
        used = [*(one.state_slot for one in sequences), *kept, *self._free]
        assert sorted(-1 if slot is None else slot for slot in used) == list(range(self.num_slots)), (
            "state slots overlap or leak"
        )

    def _take(self, spared: set[bytes]) -> int | None:
        """A free slot, else that of the kept state that was used longest ago and is not ``spared``."""
        if self._free:
            return self._free.pop()
        oldest = next((digest for digest in self._kept if digest not in spared), None)
        return None if oldest is None else self._kept.pop(oldest)

    def _keep(self, digest: bytes) -> int | None:
        """A slot for the state behind a block; ``None``: it is kept already, or there is no room."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
        elif digest not in self._new and (slot := self._take(self._read)) is not None:
            self._new[digest] = slot
            return slot
        return None

    def _move_on(self, sequence: Sequence) -> int | None:
        """A slot for the state behind an answer so far, in place of the one before."""
        before, digest = sequence.state_digest, sequence.block_hash
        sequence.state_digest = digest
        if before in self._kept and before not in self._read and digest not in self._kept and digest not in self._new:
            self._new[digest] = self._kept.pop(before)
            return self._new[digest]
        return self._keep(digest)
