"""Where the sequences of a step have the states of recurrent layers, as kernels are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tpctl.accounting import NET_CHUNK
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.kernels.delta_net.tables import Chunks, NewTokens

NUMBERS = 3
"""Numbers of a decode: the slots that its state is read from (-1: it begins), left in and copied to (-1: none)."""


def decode_slots(items: Sequence[ScheduledSequence]) -> list[list[int]]:
    """In ``NUMBERS`` columns, of decodes. Drafts are rows of a run (``kernels.delta_net.step``) behind that: the state
    behind each row is left in a slot of its own."""
    reads, writes, copies = [], [], []
    for item in items:
        state = item.state
        assert state is not None
        reads.append(-1 if state.source is None else state.source)
        drafts = len(item.drafts)
        if drafts:
            reads += range(-1 - drafts, -1)
            writes += [slot for _, slot in state.keeps]
            copies += [-1] * (1 + drafts)
        else:
            writes.append(state.slot)
            copies.append(state.keeps[0][1] if state.keeps else -1)
    return [reads, writes, copies]


def prompt_chunks(items: Sequence[ScheduledSequence], first: int) -> Chunks:
    """Of prompts, whose tokens are the step's from row ``first`` on."""
    sequences = []
    for item in items:
        state = item.state
        assert state is not None
        read = -1 if state.source is None else state.source
        sequences.append(NewTokens(first, item.num_new_tokens, item.start, read, state.slot, state.keeps))
        first += item.num_new_tokens
    return Chunks.of(sequences)


class StepStates(NamedTuple):
    """Of a step of decodes and prompts: of the decodes what ``decode_slots`` gives, and the prompts' chunks."""

    columns: list[list[int]]
    chunks: Chunks

    @classmethod
    def of(cls, batch: ScheduledBatch) -> StepStates:
        decodes = batch.num_decodes
        return cls(decode_slots(batch.items[:decodes]), prompt_chunks(batch.items[decodes:], decodes))


def count_chunks(items: Sequence[ScheduledSequence]) -> int:
    """How many chunks ``prompt_chunks`` makes of them."""
    chunks = 0
    for item in items:
        assert item.state is not None
        start = 0
        for stop in (*(after for after, _ in item.state.keeps), item.num_new_tokens):
            chunks += -(-(stop - start) // NET_CHUNK)
            start = stop
    return chunks


def flat(columns: Sequence[Sequence[int]]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """All columns behind each other."""
    return np.array([number for column in columns for number in column], dtype=np.int32)
