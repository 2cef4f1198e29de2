"""Turns a scheduled step into the tensors of a ``ForwardBatch``."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceType
from typing import NamedTuple

import torch

from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.layers.attention.base import Place
from tpctl.layers.batch import ForwardBatch, PoolTables, SequenceState


class Run(NamedTuple):
    """Tokens of ``sequence`` in a row, from the one at ``start`` on; what they are is for the caller to know."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


def build_forward_batch(
    batch: ScheduledBatch, block_size: int, device: torch.device, places: SequenceType[Place] = (Place(),)
) -> ForwardBatch:
    """Token ids, rotary rows, slots and block tables of ``batch``; all its tokens must be known on the host.

    Args:
        places: where the blocks of each pool lie in the backend's caches.
    """
    ids: list[int] = []
    rows: list[int] = []
    for item in batch.items:
        begin = len(ids)
        ids.extend(item.token_ids)
        rows.extend(begin + place - 1 - item.start for place in item.places)
    runs = [Run(item.sequence, item.start, item.num_new_tokens) for item in batch.items]
    forward = build_runs(runs, ids, block_size, device, places)
    forward.logits_rows = torch.tensor(rows, dtype=torch.int64, device=device)
    forward.states = [SequenceState(*item.state) for item in batch.items if item.state is not None] or None
    forward.num_decodes = batch.num_decodes
    return forward


def build_runs(
    runs: SequenceType[Run],
    ids: Iterable[int],
    block_size: int,
    device: torch.device,
    places: SequenceType[Place] = (Place(),),
) -> ForwardBatch:
    """The same of any ``runs``, those of one token first; no logits are wanted of ``ids``, their tokens."""
    rope: list[int] = []
    for run in runs:
        rope.extend(range(run.sequence.rope_offset + run.start, run.sequence.rope_offset + run.end))
    return ForwardBatch(
        input_ids=torch.tensor(list(ids), dtype=torch.int64, device=device),
        rope_positions=torch.tensor(rope, dtype=torch.int64, device=device),
        pools=tuple(_tables(runs, number, place, block_size, device) for number, place in enumerate(places)),
        query_lens=[run.num_tokens for run in runs],
        seq_lens=[run.end for run in runs],
        num_decodes=sum(run.num_tokens == 1 for run in runs),
        logits_rows=torch.empty(0, dtype=torch.int64, device=device),
    )


def _tables(runs: SequenceType[Run], pool: int, place: Place, block_size: int, device: torch.device) -> PoolTables:
    slots: list[int] = []
    tables = [run.sequence.block_tables[pool] for run in runs]
    for run, table in zip(runs, tables, strict=True):
        first = run.start // block_size
        ids = place.ids(table[first : -(-run.end // block_size)])
        slots.extend(ids[at // block_size - first] * block_size + at % block_size for at in range(run.start, run.end))
    width = max(map(len, tables))
    padded = [place.ids(table) + [0] * (width - len(table)) for table in tables]
    return PoolTables(
        torch.tensor(slots, dtype=torch.int64, device=device), torch.tensor(padded, dtype=torch.int32, device=device)
    )
