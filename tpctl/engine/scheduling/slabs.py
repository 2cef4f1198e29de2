"""Whose memory is whose: slabs that hold blocks of one pool at a time, and each pool's blocks.

Layers of one kind, which see equally far back, share a pool: a set of blocks, numbered from 0, of which a slab holds
``per_slab``. Blocks ``s * per_slab`` and on are those of slab s; they exist while the slab is the pool's.

A block is used, by one or more sequences, or free. A free one may still be cached: registered under a hash, to be found
until it is given away. What a pool is given next is, in this order:

    a free block without content        of a slab of its own
    a block of an empty slab
    the oldest                          of its own cached blocks and of other pools' slabs that nobody uses

A slab of which no block is used is given away whole, so that what is taken together lies together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import repeat


class BlockPool:
    """One pool's books.

    Attributes:
        window: tokens that its layers see, the token's own included; ``None``: all.
        users: of each used block.
        cached, hashes: blocks by the hashes that they are registered under, and hashes by their blocks.
        raw: free blocks without content.
        free: other free blocks, the next to be given away first, with the time of their release.
        idle: slabs of which no block is used and some are cached, likewise.
    """

    def __init__(self, window: int | None, per_slab: int, block_size: int) -> None:
        self.window = window
        self.per_slab = per_slab
        self.reach = 0 if window is None else -(-(window - 1) // block_size)
        """Blocks before a border that the token behind it sees, of a pool with a window."""
        self.users: dict[int, int] = {}
        self.cached: dict[bytes, int] = {}
        self.hashes: dict[int, bytes] = {}
        self.raw: dict[int, None] = {}
        self.free: OrderedDict[int, int] = OrderedDict()
        self.idle: OrderedDict[int, int] = OrderedDict()

    def blocks(self, slab: int) -> range:
        """Those of a slab."""
        return range(slab * self.per_slab, (slab + 1) * self.per_slab)

    def forget(self, block: int) -> bool:
        """Let nobody find a block any more; whether anybody could."""
        digest = self.hashes.pop(block, None)
        if digest is not None:
            del self.cached[digest]
        return digest is not None

    @property
    def spare(self) -> int:
        """Free blocks in slabs that are in use."""
        return len(self.raw) + len(self.free) - self.per_slab * len(self.idle)


class Slabs:
    """The slabs 0 to ``count - 1``, shared by ``pools``."""

    def __init__(self, count: int, pools: Sequence[BlockPool]) -> None:
        self.count = count
        self.pools = tuple(pools)
        self.empty = deque(range(count))
        self.evictions = 0
        self._used = [0] * count  # blocks
        self._clock = 0

    @property
    def num_free(self) -> int:
        """Slabs that nobody uses."""
        return len(self.empty) + sum(len(pool.idle) for pool in self.pools)

    def slack(self, needs: Iterable[int], revived: Iterable[tuple[int, int]] | None = None) -> int:
        """How many slabs nobody would use if each pool were given so many blocks more; negative: they cannot be.

        Args:
            revived: of each pool, as ``revival`` says it, what is in use by then.
        """
        left = len(self.empty)
        for pool, need, (blocks, woken) in zip(self.pools, needs, revived or repeat((0, 0)), strict=False):
            spare = pool.spare + woken * pool.per_slab - blocks
            left += len(pool.idle) - woken - max(0, -(-(need - spare) // pool.per_slab))
        return left

    def revival(self, pool: BlockPool, blocks: Iterable[int]) -> tuple[int, int]:
        """How many of these cached blocks nobody uses, and in how many idle slabs they are."""
        free = [block for block in blocks if block in pool.free]
        return len(free), len({block // pool.per_slab for block in free} & pool.idle.keys())

    def take(self, needs: Sequence[int]) -> list[list[int]]:
        """So many blocks for each pool, where ``slack`` says that there are enough."""
        left, taken = list(needs), []
        for number, pool in enumerate(self.pools):
            blocks = []
            for _ in range(needs[number]):
                # Where no slab is to spare, what is free in used ones comes first.
                blocks.append(self._take(pool, close=len(self.pools) > 1 and self.slack(left) == 0))
                left[number] -= 1
            taken.append(blocks)
        return taken

    def revive(self, pool: BlockPool, block: int) -> None:
        """Let one sequence more use a cached block."""
        if block in pool.users:
            pool.users[block] += 1
            return
        del pool.free[block]
        self._use(pool, block)

    def give_back(self, pool: BlockPool, block: int, *, first: bool = False) -> None:
        """Let one sequence less use a block. first: it is to be given away before all others that are cached."""
        pool.users[block] -= 1
        if pool.users[block]:
            return
        del pool.users[block]
        self._clock += 1
        if block in pool.hashes:
            pool.free[block] = 0 if first else self._clock
            if first:
                pool.free.move_to_end(block, last=False)
        else:
            pool.raw[block] = None
        slab = block // pool.per_slab
        self._used[slab] -= 1
        if not self._used[slab]:
            self._rest(pool, slab)

    def drop(self, pool: BlockPool, block: int) -> None:
        """Let nobody find a block any more, used or free."""
        if pool.forget(block) and block in pool.free:
            del pool.free[block]
            pool.raw[block] = None
            slab = block // pool.per_slab
            if not self._used[slab]:
                self._rest(pool, slab)

    def check_integrity(self) -> None:
        """Check that every slab is empty or one pool's, with all its blocks used or free, and only those.

        Raises:
            AssertionError: it is not so, or a hash is registered for two blocks, or a block under two.
        """
        seen = list(self.empty)
        for pool in self.pools:
            blocks = [*pool.users, *pool.raw, *pool.free]
            assert len(blocks) == len(set(blocks)), "free and used overlap"
            assert {digest: block for block, digest in pool.hashes.items()} == pool.cached, "hashes differ"
            assert len(pool.hashes) == len(pool.cached), "a block is registered under two hashes"
            assert pool.free.keys() <= pool.hashes.keys() and not pool.raw.keys() & pool.hashes.keys(), (
                "content is lost"
            )
            assert pool.hashes.keys() <= pool.users.keys() | pool.free.keys(), "a block that is not there is cached"
            slabs = {block // pool.per_slab for block in blocks}
            assert sorted(blocks) == [block for slab in sorted(slabs) for block in pool.blocks(slab)], "blocks leak"
            used = {slab: sum(block in pool.users for block in pool.blocks(slab)) for slab in slabs}
            assert all(self._used[slab] == count for slab, count in used.items()), "a slab's users are others"
            assert {slab for slab, count in used.items() if not count} == set(pool.idle), "idle slabs differ"
            seen += slabs
        assert sorted(seen) == list(range(self.count)), "slabs overlap or leak"

    def _take(self, pool: BlockPool, close: bool) -> int:
        if close and (block := self._spare(pool)) is not None:
            return self._given(pool, block)
        if not pool.raw:
            self._make_room(pool)
        return self._given(pool, next(reversed(pool.raw)) if pool.raw else next(iter(pool.free)))

    def _spare(self, pool: BlockPool) -> int | None:
        """A free block in a slab that is in use, without content if there is one."""
        if not pool.spare:
            return None
        return next(
            (block for blocks in (pool.raw, pool.free) for block in blocks if self._used[block // pool.per_slab]), None
        )

    def _make_room(self, pool: BlockPool) -> None:
        """Give ``pool`` a slab without content, unless one of its cached blocks is to be given away next."""
        if self.empty:
            self._assign(self.empty.popleft(), pool)
            return
        oldest = next(iter(pool.free.items()), None)
        dissolved: tuple[int, BlockPool, int] | None = None
        if oldest is not None:
            slab = oldest[0] // pool.per_slab
            if self._used[slab] == 0:
                dissolved = oldest[1], pool, slab
        for other in self.pools:
            if other is not pool and other.idle:
                slab, since = next(iter(other.idle.items()))
                if (oldest is None or since < oldest[1]) and (dissolved is None or since < dissolved[0]):
                    dissolved = since, other, slab
        if dissolved is not None:
            _, owner, slab = dissolved
            self._dissolve(owner, slab)
            self._assign(slab, pool)

    def _given(self, pool: BlockPool, block: int) -> int:
        """Take a free block, its content gone."""
        if block in pool.raw:
            del pool.raw[block]
        else:
            del pool.free[block]
            pool.forget(block)
            self.evictions += 1
        self._use(pool, block)
        return block

    def _use(self, pool: BlockPool, block: int) -> None:
        pool.users[block] = 1
        slab = block // pool.per_slab
        self._used[slab] += 1
        if self._used[slab] == 1:
            pool.idle.pop(slab, None)

    def _rest(self, pool: BlockPool, slab: int) -> None:
        """Count a slab of which no block is used any more among the idle ones, or, without content, the empty ones."""
        times = [pool.free[block] for block in pool.blocks(slab) if block in pool.free]
        if not times:
            self._dissolve(pool, slab)
            self.empty.appendleft(slab)
            return
        pool.idle[slab] = max(times)
        if not max(times):
            pool.idle.move_to_end(slab, last=False)

    def _dissolve(self, pool: BlockPool, slab: int) -> None:
        """Take a slab that nobody uses away from a pool."""
        pool.idle.pop(slab, None)
        for block in pool.blocks(slab):
            pool.raw.pop(block, None)
            if pool.free.pop(block, None) is not None:
                pool.forget(block)
                self.evictions += 1

    def _assign(self, slab: int, pool: BlockPool) -> None:
        for block in reversed(pool.blocks(slab)):  # the last in is the first out
            pool.raw[block] = None
        pool.idle[slab] = 0  # until the first of them is used
