"""The paged KV cache's books: which blocks belong to whom, and which may be shared.

A block holds the keys and values of ``block_size`` consecutive tokens, in the layers of its pool (``slabs``): all
layers that see equally far back. A sequence has a block table for each pool. Where layers have a window, a block that
no later query can see is given back, and its place in the table says ``GONE``.

A full block is identified by a hash over its tokens and all tokens before them, so two sequences with an equal prefix
share its blocks. A block that nobody uses keeps its content until its memory is needed for something else; until then a
new sequence with the same prefix finds it again. It can go on behind block n if the pools without a window have the
blocks 1 to n, and every other one those that the next token sees.

Blocks that a window has passed are the first to be given away, but for those that somebody is likely to go on from:
before the end of a prompt, and before the border up to which others' blocks were found, where prompts part.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Container, Iterator
from collections.abc import Sequence as SequenceType
from hashlib import blake2b
from operator import add
from typing import NamedTuple

from tpctl.accounting import KvLayout
from tpctl.engine.scheduling.sequence import GONE, Sequence
from tpctl.engine.scheduling.slabs import BlockPool, Slabs


class Prefix(NamedTuple):
    """The beginning of a sequence that is there already.

    Attributes:
        blocks: how many need not be computed.
        tables: these, in each pool, ``GONE`` where no later token sees them.
        digest: the hash of the last.
        met: how far others' blocks were found, ``blocks`` or beyond.
    """

    blocks: int
    tables: tuple[list[int], ...]
    digest: bytes
    met: int


class BlockManager:
    """Hands out the blocks of ``num_slabs`` slabs.

    Args:
        layout: the pools; by default one, whose blocks the slabs are.
    """

    def __init__(
        self,
        num_slabs: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        layout: KvLayout | None = None,
    ) -> None:
        self.layout = layout or KvLayout(block_size)
        assert self.layout.block_size == block_size
        self.num_slabs = num_slabs
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        windows, held = self.layout.windows, self.layout.per_slab
        self.pools = tuple(BlockPool(*pool, block_size) for pool in zip(windows, held, strict=True))
        self.slabs = Slabs(num_slabs, self.pools)
        self.has_windows = windows != (None,)
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._whole = tuple(pool for pool in self.pools if pool.window is None)
        self._windowed = tuple(pool for pool in self.pools if pool.window is not None)
        self.nothing = Prefix(0, tuple([] for _ in self.pools), b"", 0)

    @property
    def num_free_slabs(self) -> int:
        return self.slabs.num_free

    @property
    def evictions(self) -> int:
        """Cached blocks that were given to other tokens."""
        return self.slabs.evictions

    @property
    def room(self) -> int:
        """Tokens that it holds at least, of sequences of any lengths."""
        each = sum(1 / held for held in self.layout.per_slab)
        return int(self.num_slabs / each) * self.block_size

    def match_prefix(self, sequence: Sequence, kept: Container[bytes] | None = None) -> Prefix:
        """The longest cached beginning of ``sequence``; never all of it, since one token must be computed.

        Args:
            kept: hashes of blocks; it ends behind one of these.
        """
        if not self.enable_prefix_caching or sequence.alone:
            return self.nothing
        digests: list[bytes] = []
        runs, count, met = [0] * len(self._windowed), 0, 0
        for digest in self._digests(sequence, (len(sequence.token_ids) - 1) // self.block_size):
            if any(digest not in pool.cached for pool in self._whole):
                break
            digests.append(digest)
            suits = kept is None or digest in kept
            for number, pool in enumerate(self._windowed):
                runs[number] = runs[number] + 1 if digest in pool.cached else 0
                suits = suits and runs[number] >= min(pool.reach, len(digests))
            if suits:
                count = len(digests)
            if self._whole or any(runs):
                met = len(digests)
        tables = []
        for pool in self.pools:
            gone = 0 if pool.window is None else max(0, count - pool.reach)
            tables.append([GONE] * gone + [pool.cached[digest] for digest in digests[gone:count]])
        return Prefix(count, tuple(tables), digests[count - 1] if count else b"", met)

    def admit(
        self,
        sequence: Sequence,
        prefix: Prefix,
        num_tokens: int,
        now: int | None = None,
        running: Collection[Sequence] = (),
    ) -> int:
        """Give a sequence without blocks its matched ones and fresh ones up to ``num_tokens``, if that leaves enough.

        Args:
            now: how many are computed next, by default all. Where layers have a window, blocks up to these do, and
                there may be as few as there is room for.
            running: sequences that have to be left another block each, but where their windows are full: there one
                comes for one that goes.

        Returns:
            How many can be computed next; 0: too little is left, and nothing has changed.
        """
        assert not sequence.block_tables
        start, whole = prefix.blocks * self.block_size, -(-num_tokens // self.block_size)
        now = num_tokens - start if now is None else now
        tables = zip(self.pools, prefix.tables, strict=True)
        revived = [self.slabs.revival(pool, table) for pool, table in tables] if prefix.blocks else None
        reserve = [self._reserve(pool, running) for pool in self.pools]
        while now:
            first = -(-(start + now) // self.block_size)
            needs = [(whole if pool.window is None else min(whole, first)) - prefix.blocks for pool in self.pools]
            if self.slabs.slack(map(add, needs, reserve), revived) >= 0:
                break
            now = now // 2 if self._windowed else 0
        else:
            return 0
        for pool, table in zip(self.pools, prefix.tables, strict=True):
            for block in table:
                if block != GONE:
                    self.slabs.revive(pool, block)
        sequence.block_tables = tuple(list(table) for table in prefix.tables)
        sequence.block_hash = prefix.digest
        sequence.num_hashed_blocks = prefix.blocks
        sequence.has_shared = prefix.blocks > 0
        sequence.num_computed_tokens = start
        sequence.admissions += 1
        sequence.borders = (prefix.met, (len(sequence.token_ids) - 1) // self.block_size)
        if sequence.admissions == 1:  # what it finds of itself after a preemption is no hit
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.queried_tokens += sequence.num_prompt_tokens
            self.hit_tokens += sequence.num_cached_tokens
        self._add(sequence, needs)
        return now

    def grow(self, sequence: Sequence, num_tokens: int, running: Collection[Sequence] = ()) -> bool:
        """Let ``sequence``, of which ``num_computed_tokens`` are, hold ``num_tokens`` tokens; ``False`` if there is too
        little left (``running`` as in ``admit``), and then it has what it had, but for blocks that no later query
        sees."""
        if num_tokens <= sequence.num_slots:
            return True
        if not sequence.block_tables:
            sequence.block_tables = tuple([] for _ in self.pools)
        if self._windowed:
            self._slide(sequence)
        blocks = -(-num_tokens // self.block_size)
        needs = [max(0, blocks - len(table)) for table in sequence.block_tables]
        reserve = [self._reserve(pool, running) for pool in self.pools]
        if self.slabs.slack(map(add, needs, reserve)) < 0:
            return False
        self._add(sequence, needs)
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
            for pool, table in zip(self.pools, sequence.block_tables, strict=True):
                # An equal block may be registered already, when two such sequences were computed at the same time.
                if digest not in pool.cached and table[index] != GONE:
                    pool.cached[digest] = table[index]
                    pool.hashes[table[index]] = digest

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of these tokens any more, whoever computed them."""
        for digest in self.digests(sequence):
            for pool in self.pools:
                if digest in pool.cached:
                    self.slabs.drop(pool, pool.cached[digest])

    def digest(self, sequence: Sequence, count: int) -> bytes:
        """The hash of a sequence's block number ``count``, counted from 1."""
        return deque(self._digests(sequence, count), maxlen=1)[0]

    def digests(self, sequence: Sequence) -> Iterator[bytes]:
        """Those of all its full blocks."""
        return self._digests(sequence, len(sequence.token_ids) // self.block_size)

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``; its last ones will be evicted first, since prefixes are shared more."""
        self._release_blocks(sequence)
        sequence.num_hashed_blocks = 0
        sequence.block_hash = b""
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: SequenceType[Sequence] = ()) -> None:
        """Check that ``sequences``, all that hold blocks, account for every block that is not free, and hold all that
        their next tokens see.

        Raises:
            AssertionError: a block is lost, freed while in use, or registered under a hash that is not its own.
        """
        for number, pool in enumerate(self.pools):
            users: dict[int, int] = {}
            for sequence in sequences:
                table = sequence.block_tables[number]
                held = [block for block in table if block != GONE]
                assert len(set(held)) == len(held), f"{sequence} holds a block twice"
                assert table[len(table) - len(held) :] == held, f"{sequence} has lost a block"
                if pool.window is None:
                    assert len(held) == len(table), f"{sequence} has lost a block that all its tokens see"
                else:
                    first = max(0, sequence.num_computed_tokens - pool.window + 1) // self.block_size
                    assert GONE not in table[first:], f"{sequence} has lost a block of its window"
                for block in held:
                    users[block] = users.get(block, 0) + 1
            assert users == pool.users, "a block's users are not the sequences that hold it"
        self.slabs.check_integrity()

    def _add(self, sequence: Sequence, needs: SequenceType[int]) -> None:
        for table, blocks in zip(sequence.block_tables, self.slabs.take(needs), strict=True):
            table += blocks
        sequence.num_slots = min(map(len, sequence.block_tables)) * self.block_size

    @staticmethod
    def _reserve(pool: BlockPool, running: Collection[Sequence]) -> int:
        """Blocks that ``running`` may need next."""
        window = pool.window
        return len(running) if window is None else sum(one.num_computed_tokens < window for one in running)

    def _slide(self, sequence: Sequence) -> None:
        """Give back what the next query and all later ones do not see: it stands behind all that is computed, however
        many more tokens may turn out to be wanted or not."""
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            if pool.window is None:
                continue
            index = max(0, sequence.num_computed_tokens - pool.window + 1) // self.block_size - 1
            while index >= 0 and table[index] != GONE:
                self._give_back(pool, table[index], index, sequence.borders)
                table[index] = GONE
                index -= 1

    def _release_blocks(self, sequence: Sequence) -> None:
        borders = (*sequence.borders, sequence.num_hashed_blocks)
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            for index in reversed(range(len(table))):
                if table[index] == GONE:
                    break
                self._give_back(pool, table[index], index, borders)
        sequence.block_tables = ()
        sequence.num_slots = 0

    def _give_back(self, pool: BlockPool, block: int, index: int, borders: tuple[int, ...]) -> None:
        """Give back a sequence's block of that number: to be the first to go, if it is of a window that somebody sees
        who goes on behind it, but behind none of these ``borders``."""
        seen = pool.window is None or any(border - pool.reach <= index < border for border in borders)
        self.slabs.give_back(pool, block, first=not seen)

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
