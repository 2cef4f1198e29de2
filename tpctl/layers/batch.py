"""What one forward pass computes: built once a step by the engine and passed down to every layer.

Shape letters used in ``layers`` and ``engine``:

    T  new tokens of the step, all sequences one after another      S  sequences
    H  hidden size         N  query heads of this rank              K  KV heads of this rank
    D  head dimension      G  query heads per KV head (N / K)       I  this rank's share of the MLP
    B  block size          M  blocks in the widest block table      V  this rank's share of the vocabulary
    R  rows that are sampled                                        L  keys of a sequence
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from tpctl.kernels.delta_net.chunks import ChunkTables


class PoolTables(NamedTuple):
    """Where the keys and values of a step's tokens lie, in the layers of one pool: those that see equally far back.

    slot_mapping: int64 [T], where each token's key and value go: ``block * block_size + offset``; -1 nowhere.
    block_tables: int32 [S, M], block ids; entries past a sequence's blocks, and of blocks that no query of the step
    sees, mean nothing, but are ids of blocks that there are.
    """

    slot_mapping: Tensor
    block_tables: Tensor


class PrefillChunks(NamedTuple):
    """Where P prefill chunks of a step lie, as in ``ForwardBatch``; in a captured step some may be empty.

    block_tables: int32 [P, M], of each pool. query_start_P1: int32 [P + 1], rows of T. seq_lens_P: int32 [P]. pairs: of
    a new token and one that it sees, without windows; ``None``: the host does not know.
    """

    block_tables: tuple[Tensor, ...]
    query_start_P1: Tensor
    seq_lens_P: Tensor
    pairs: int | None = None


class SequenceState(NamedTuple):
    """Where recurrent layers have the state of one sequence of a step.

    Attributes:
        slot: its own, where its state is left.
        source: the slot that it goes on from; ``None``: it begins.
        keeps: (of the sequence's new tokens so many, a slot), in order: after these its state is copied there, too.
    """

    slot: int
    source: int | None
    keeps: tuple[tuple[int, int], ...] = ()


class StateTables(NamedTuple):
    """The same for kernels. ``rows``: int32 [3, S], of each decode the slots that its state is read from (-1: it
    begins), left in (-1: there is no row) and copied to (-1: none). ``chunks``: of the prompts, if there are any.
    ``runs``: there may be rows of drafts, as ``kernels.delta_net.step.StepRows`` has them."""

    rows: Tensor
    chunks: ChunkTables | None = None
    runs: bool = False


@dataclass
class ForwardBatch:
    """One step's input. Sequences with one new token (decodes) come first, then prefill chunks.

    Attributes:
        input_ids: int64 [T].
        rope_positions: int64 [T], rows of the rotary table. A token's position, plus the offset of the table that
            its sequence uses (long RoPE keeps two).
        pools: of each pool of layers (``LayerKV.pool``).
        query_lens: new tokens of each sequence.
        seq_lens: tokens of each sequence up to and including the new ones.
        num_decodes: how many sequences, from the first, are decodes.
        logits_rows: int64 [R], rows of T whose logits are wanted.
        query_start_S1, seq_lens_S: int32 device copies of the lengths, for kernels; ``None`` where unused.
        long_context: whether the backend called this step long (``PagedBackend.is_long``).
        chunks: set in a captured step of decodes and prefill chunks, whose split must not be part of the graph: every
            row then counts as a decode, with a length of 0 in ``seq_lens_S`` where it belongs to one of these chunks.
        states: of each sequence, where the model has recurrent layers. state_tables: likewise, for kernels.
        shared_1: int32 [1], set in a captured step of decodes that all begin with the same blocks: how many tokens
            those hold, which are fewer than any sequence's.
    """

    input_ids: Tensor
    rope_positions: Tensor
    pools: tuple[PoolTables, ...]
    query_lens: list[int]
    seq_lens: list[int]
    num_decodes: int
    logits_rows: Tensor
    query_start_S1: Tensor | None = None
    seq_lens_S: Tensor | None = None
    long_context: bool = False
    chunks: PrefillChunks | None = None
    states: list[SequenceState] | None = None
    state_tables: StateTables | None = None
    shared_1: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def prompts(self) -> Iterator[tuple[slice, int, int | None]]:
        """The prefill chunks: the rows of T of some sequences and how many these are, all as long and without a cached
        prefix; or of one sequence that has a prefix, with its number."""
        start = index = self.num_decodes
        lengths = list(zip(self.query_lens, self.seq_lens, strict=True))[index:]
        for (new, length), group in groupby(lengths):
            count = len(list(group))
            if new == length:
                yield slice(start, start + count * new), count, None
            else:
                for one in range(count):
                    yield slice(start + one * new, start + (one + 1) * new), 1, index + one
            start += count * new
            index += count
