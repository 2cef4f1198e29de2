"""Which blocks a step's decodes read together, and what was gathered of them for the step before.

Decodes of similar length are gathered and multiplied together, with as many blocks as the longest has. While the same
sequences decode, what was gathered is kept, and each step adds its new keys and values to it: gathering is the dearest
part of a step after the linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.layers.attention.sdpa_cache import PagedKV
from tpctl.layers.batch import ForwardBatch

MOST_KEPT = 1 << 29
"""Bytes of gathered keys and values that are kept from step to step, in all layers together; of a small cache less."""


@dataclass
class Kept:
    """Gathered keys and values that the next step may continue: of ``lens`` tokens in the blocks ``tables_SW``.

    ``tables_SW`` is -1 behind a sequence's own blocks. ``layers`` holds [2, K * S, L, D] (of latent attention
    [1, S, L, D]) for each layer; there is room for L tokens.
    """

    lens: list[int]
    tables_SW: Tensor
    layers: dict[int, Tensor]

    @property
    def room(self) -> int:
        """L."""
        return next(iter(self.layers.values())).shape[2]

    def is_followed_by(self, lens: list[int], tables_SW: Tensor) -> bool:
        """Whether the next step's decodes are the same sequences, each with one token more, for which there is room.

        Equal block tables are enough to tell: a sequence that is new has been a prompt in between, or found all of its
        blocks, and so their contents, in the prefix cache.
        """
        grown = all(new == old + 1 for new, old in zip(lens, self.lens, strict=True))
        if not (grown and self.layers) or max(lens) > self.room:
            return False
        new_SW = tables_SW[:, : self.tables_SW.shape[1]]
        return bool(((self.tables_SW == new_SW) | (self.tables_SW < 0)).all())


@dataclass(frozen=True)
class Bucket:
    """Decodes of similar length, gathered and multiplied together.

    Attributes:
        rows: their rows of the batch (``None``: all decodes, in order).
        blocks: int64 [S * width], the blocks of each, padded with the empty one.
        lens_S: how many of the gathered keys are a sequence's own.
        cells: int64 [S, 1], where ``kept`` goes on with the step before: the rows of one head's words that the new
            tokens take.
    """

    rows: Tensor | None
    blocks: Tensor
    count: int
    width: int
    lens_S: Tensor
    kept: Kept | None = None
    cells: Tensor | None = None
    _cells_of: dict[int, Tensor] = field(default_factory=dict)

    def cells_of(self, vectors: int) -> Tensor:
        """The same for that many vectors of a token, keys and values of all heads, token by token."""
        assert self.cells is not None and self.kept is not None
        found = self._cells_of.get(vectors)
        if found is None:
            heads = torch.arange(vectors, device=self.cells.device) * (self.count * self.kept.room)
            found = self._cells_of[vectors] = (self.cells + heads).flatten()
        return found


class Gathering:
    """What decodes gather, from step to step.

    Args:
        block_size: tokens of a block.
        windows: of each pool, the tokens that its layers see, or ``None``.
        token_bytes: of each pool, what its layers gather of a token.
        most: bytes that are kept at most.
    """

    def __init__(self, block_size: int, windows: Sequence[int | None], token_bytes: Sequence[int], most: int) -> None:
        self._block_size = block_size
        self._windows = windows
        self._token_bytes = token_bytes
        self._most = most
        self._kept: dict[tuple[int, ...], Kept] = {}  # by pool and the rows of a bucket

    def buckets(self, kv: PagedKV, batch: ForwardBatch) -> list[Bucket]:
        """Group a step's decodes, for the layers of one pool, so that none gathers more than about twice the blocks it
        has; once a step."""
        pool = kv.pool
        firsts = [self.first_block(pool, length - 1) for length in batch.seq_lens[: batch.num_decodes]]
        lens = [length - first * self._block_size for length, first in zip(batch.seq_lens, firsts, strict=False)]
        members: dict[int, list[int]] = {}
        for row, length in enumerate(lens):
            members.setdefault((-(-length // self._block_size)).bit_length(), []).append(row)
        before = {key: self._kept.pop(key) for key in list(self._kept) if key[0] == pool}
        found = []
        for rows in members.values():
            key, alone = (pool, *rows), len(members) == 1
            bucket = self._bucket(kv, batch, rows, firsts, lens, alone, before.get(key))
            found.append(bucket)
            if bucket.kept is not None:
                self._kept[key] = bucket.kept
        return found

    def forget(self) -> None:
        """Let the next step go on with nothing of what the ones before have gathered."""
        self._kept = {}

    def first_block(self, pool: int, query: int) -> int:
        """The first block that a query at that position sees, in a pool's layers."""
        window = self._windows[pool]
        return 0 if window is None else max(0, query + 1 - window) // self._block_size

    def _bucket(
        self,
        kv: PagedKV,
        batch: ForwardBatch,
        rows: list[int],
        firsts: list[int],
        all_lens: list[int],
        alone: bool,
        before: Kept | None,
    ) -> Bucket:
        """The bucket of these rows, each sequence from its block ``firsts`` on, of ``all_lens`` tokens; ``before`` is
        what the last step kept of them."""
        tables = batch.pools[kv.pool].block_tables
        device = tables.device
        index = torch.tensor(rows, device=device)
        own = None if alone else index
        lens = [all_lens[row] for row in rows]
        lens_S = torch.tensor(lens, device=device)
        width = -(-max(lens) // self._block_size)
        if any(firsts):
            columns_SW = torch.tensor([firsts[row] for row in rows], device=device).unsqueeze(1)
            columns_SW = columns_SW + torch.arange(width, device=device)
            tables_SW = tables[index].gather(1, columns_SW.clamp(max=tables.shape[1] - 1))
        else:
            tables_SW = tables[index, :width]
        used = torch.arange(width, device=device) < (-(-lens_S // self._block_size)).unsqueeze(1)
        now_SW = tables_SW.masked_fill(~used, -1)
        tables_SW = tables_SW.masked_fill(~used, kv.empty_id)
        if before is not None and before.is_followed_by(lens, now_SW):
            kept = Kept(lens, now_SW, before.layers)
            sequences = torch.arange(len(rows), device=device).unsqueeze(1)
            cells = sequences * kept.room + lens_S.unsqueeze(1) - 1
            return Bucket(own, index[:0], len(rows), kept.room // self._block_size, lens_S, kept, cells)
        fresh: Kept | None = None
        taken = sum(
            len(other.lens) * (other.tables_SW.shape[1] + 1) * self._token_bytes[pool]
            for (pool, *_), other in self._kept.items()
        )
        taken += len(rows) * (width + 1) * self._token_bytes[kv.pool]
        if taken * self._block_size <= self._most:
            fresh = Kept(lens, now_SW, {})
            tables_SW = F.pad(tables_SW, (0, 1), value=kv.empty_id)  # room for the tokens to come
            width += 1
        return Bucket(own, tables_SW.flatten(), len(rows), width, lens_S, fresh)
