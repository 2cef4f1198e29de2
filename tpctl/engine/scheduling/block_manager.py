"""The paged KV cache's books: which block belongs to whom, and which may be shared.

A block holds the keys and values of ``block_size`` consecutive tokens. A full block is identified by a hash over its
tokens and all tokens before them, so two sequences with an equal prefix share its blocks. A block that nobody uses
keeps its content until it is needed for something else, least recently used first; until then a new sequence with
the same prefix finds it again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceType
from hashlib import blake2b

from tpctl.engine.scheduling.sequence import Sequence


class BlockManager:
    """Hands out the blocks 0 to ``num_blocks - 1``.

    Every block is either used (by one or more sequences) or free. A free block may still be cached: registered under
    its hash, to be found by ``match_prefix`` until it is evicted.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._users = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        # Free blocks in the order in which they are handed out: the first is the least recently used.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.evictions = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks that hold the beginning of ``sequence``; never all of it, since one token must be computed."""
        if not self.enable_prefix_caching or sequence.alone:
            return []
        found: list[int] = []
        for digest in self._digests(sequence, (len(sequence.token_ids) - 1) // self.block_size):
            block = self._cached.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def admit(self, sequence: Sequence, matched: SequenceType[int], num_tokens: int, reserve: int = 0) -> bool:
        """Give a sequence without blocks its matched ones and fresh ones up to ``num_tokens``.

        ``False`` if that would leave fewer than ``reserve`` blocks free, and then nothing has changed.
        """
        assert not sequence.block_table
        revived = sum(1 for block in matched if self._users[block] == 0)
        fresh = -(-num_tokens // self.block_size) - len(matched)
        if revived + fresh + reserve > len(self._free):
            return False
        for block in matched:
            if self._users[block] == 0:
                del self._free[block]
            self._users[block] += 1
            sequence.block_table.append(block)
            sequence.block_hash = self._hashes[block] or b""
        sequence.admissions += 1
        sequence.num_hashed_blocks = len(matched)
        sequence.has_shared = bool(matched)
        sequence.num_computed_tokens = len(matched) * self.block_size
        if sequence.admissions == 1:  # what it finds of itself after a preemption is no hit
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.queried_tokens += sequence.num_prompt_tokens
            self.hit_tokens += sequence.num_cached_tokens
        for _ in range(fresh):
            sequence.block_table.append(self._take())
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let ``sequence`` hold ``num_tokens`` tokens; ``False`` if too few blocks are free, and nothing changes."""
        fresh = -(-num_tokens // self.block_size) - len(sequence.block_table)
        if fresh > len(self._free):
            return False
        for _ in range(fresh):
            sequence.block_table.append(self._take())
        return True

    def register(self, sequence: Sequence) -> None:
        """Offer the full blocks whose tokens are known and computed (or about to be, this step) for sharing."""
        if not self.enable_prefix_caching or sequence.alone:
            return
        known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        for index in range(sequence.num_hashed_blocks, known // self.block_size):
            previous = sequence.block_hash if index else self._seed(sequence)
            digest = self._hash(previous, self._tokens(sequence, index))
            sequence.block_hash = digest
            sequence.num_hashed_blocks += 1
            block = sequence.block_table[index]
            # An equal block may be registered already, when two such sequences were computed at the same time.
            if digest not in self._cached:
                self._cached[digest] = block
                self._hashes[block] = digest

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of these tokens any more, whoever computed them."""
        for digest in self.digests(sequence):
            block = self._cached.pop(digest, None)
            if block is not None:
                self._hashes[block] = None
                if block in self._free:
                    self._free.move_to_end(block, last=False)

    def digest_of(self, block: int) -> bytes:
        """The hash that a block is registered under; empty if it is not."""
        return self._hashes[block] or b""

    def digest(self, sequence: Sequence, count: int) -> bytes:
        """The hash of a sequence's block number ``count``, counted from 1."""
        return deque(self._digests(sequence, count), maxlen=1)[0]

    def digests(self, sequence: Sequence) -> Iterator[bytes]:
        """Those of all its full blocks."""
        return self._digests(sequence, len(sequence.token_ids) // self.block_size)

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``; its last ones will be evicted first, since prefixes are shared more."""
        for block in reversed(sequence.block_table):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table.clear()
        sequence.num_hashed_blocks = 0
        sequence.block_hash = b""
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: SequenceType[Sequence] = ()) -> None:
        """Check that ``sequences``, all that hold blocks, account for every block that is not free.

        Raises:
            AssertionError: a block is lost, freed while in use, or registered under a hash that is not its own.
        """
        users = [0] * self.num_blocks
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table), f"{sequence} holds a block twice"
            for block in sequence.block_table:
                users[block] += 1
        assert users == self._users, "a block's users are not the sequences that hold it"
        free = set(self._free)
        assert free == {block for block, count in enumerate(users) if count == 0}, "free and used overlap or leak"
        registered = {block: digest for digest, block in self._cached.items()}
        assert len(registered) == len(self._cached), "a block is registered under two hashes"
        hashed = {block: digest for block, digest in enumerate(self._hashes) if digest is not None}
        assert registered == hashed, "registered hashes differ from the blocks' own"

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._hashes[block]
        if digest is not None:
            del self._cached[digest]
            self._hashes[block] = None
            self.evictions += 1
        self._users[block] = 1
        return block

    def _digests(self, sequence: Sequence, count: int) -> Iterator[bytes]:
        """The hashes of a sequence's first ``count`` blocks."""
        digest = self._seed(sequence)
        for index in range(count):
            digest = self._hash(digest, self._tokens(sequence, index))
            yield digest

    def _tokens(self, sequence: Sequence, index: int) -> list[int]:
        return sequence.token_ids[index * self.block_size : (index + 1) * self.block_size]

    @staticmethod
    def _seed(sequence: Sequence) -> bytes:
        """Keys rotated by different tables must not be shared, however equal the tokens."""
        return sequence.rope_offset.to_bytes(8, "little")

    @staticmethod
    def _hash(previous: bytes, tokens: list[int]) -> bytes:
        return blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()
