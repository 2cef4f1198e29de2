"""Short runs of new tokens behind a cached prefix, several sequences at once: what speculation computes at every step.

One sequence after the other, as prompts are, each would cost a dozen small operations a layer. Sequences of similar
lengths are multiplied together instead, the shorter ones filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from tpctl.layers.attention.base import AttentionSpec
from tpctl.layers.batch import ForwardBatch

LONGEST = 16
"""New tokens of a run at most; longer ones are prompts."""


@dataclass(frozen=True)
class Runs:
    """Sequences of a step that are multiplied together.

    Attributes:
        sequences: their numbers.
        rows_Sn: int64 [S, n], their rows of T; where a run is shorter, its last row is repeated.
        taken: int64, of the flat [S * n] those that are no such repetition; ``rows``: of T, the same.
        blocks: [S * W], the blocks of each that its rows see, filled up with the empty one.
        last_Sn: the last of the gathered keys that each row may look at.
    """

    sequences: list[int]
    rows_Sn: Tensor
    taken: Tensor
    rows: Tensor
    blocks: Tensor
    last_Sn: Tensor
    biases: dict[AttentionSpec, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """S and n."""
        return self.rows_Sn.shape[0], self.rows_Sn.shape[1]

    def bias(self, spec: AttentionSpec, like: Tensor, width: int) -> Tensor:
        """[K * S, n * G, L]: 0 where a row may look, -inf elsewhere."""
        found = self.biases.get(spec)
        if found is None:
            places = torch.arange(width, device=like.device)
            hidden = places > self.last_Sn.unsqueeze(-1)
            if spec.window is not None:
                hidden |= places <= self.last_Sn.unsqueeze(-1) - spec.window
            bias_SnL = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            found = bias_SnL.repeat_interleave(spec.group, 1).repeat(spec.num_kv_heads, 1, 1)
            self.biases[spec] = found
        return found


def find_runs(
    batch: ForwardBatch, pool: int, first_block: Callable[[int], int], block_size: int, empty: int, most: int
) -> list[Runs]:
    """The step's runs, by their lengths; those with more than ``most`` scores a head are left out.

    Args:
        first_block: the first one that a query at some place sees, in the pool's layers.
        empty: the block that nothing is ever written to.
    """
    found: dict[tuple[int, int], list[int]] = {}
    firsts: dict[int, int] = {}
    for sequence in range(batch.num_decodes, len(batch.query_lens)):
        new, length = batch.query_lens[sequence], batch.seq_lens[sequence]
        if new < length and new <= LONGEST:
            first = firsts[sequence] = first_block(length - new)
            key = (-(-length // block_size) - first).bit_length(), (new - 1).bit_length()
            found.setdefault(key, []).append(sequence)
    starts = [0, *accumulate(batch.query_lens)]
    runs = (_runs(batch, pool, some, starts, firsts, block_size, empty) for some in found.values())
    return [one for one in runs if one.rows_Sn.numel() * one.blocks.numel() // len(one.sequences) * block_size <= most]


def _runs(
    batch: ForwardBatch,
    pool: int,
    sequences: list[int],
    starts: list[int],
    firsts: dict[int, int],
    block_size: int,
    empty: int,
) -> Runs:
    tables_SM = batch.pools[pool].block_tables
    device = tables_SM.device
    passed = [firsts[one] for one in sequences]
    numbers = (
        [batch.query_lens[one] for one in sequences],
        [batch.seq_lens[one] - block_size * first for one, first in zip(sequences, passed, strict=True)],
        [starts[one] for one in sequences],
        passed,
    )
    news, lens, rows, first = torch.tensor(numbers, device=device).unsqueeze(-1)
    inside = torch.arange(max(numbers[0]), device=device).expand(len(sequences), -1)
    at_Sn = torch.minimum(inside, news - 1)
    rows_Sn = rows + at_Sn
    taken = (inside < news).flatten().nonzero().flatten()
    columns = torch.arange(-(-max(numbers[1]) // block_size), device=device)
    found_SW = tables_SM[torch.tensor(sequences, device=device)].gather(
        1, (first + columns).clamp(max=tables_SM.shape[1] - 1)
    )
    blocks = found_SW.masked_fill(columns >= -(-lens // block_size), empty).flatten()
    return Runs(sequences, rows_Sn, taken, rows_Sn.flatten()[taken], blocks, lens - news + at_Sn)
