"""Turns a scheduled step into the tensors of a ``ForwardBatch``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.layers.attention.base import Place
from tpctl.layers.batch import ForwardBatch, PoolTables, SequenceState


def build_forward_batch(
    batch: ScheduledBatch, block_size: int, device: torch.device, places: Sequence[Place] = (Place(),)
) -> ForwardBatch:
    """Token ids, rotary rows, slots and block tables of ``batch``; all its tokens must be known on the host.

    Args:
        places: where the blocks of each pool lie in the backend's caches.
    """
    ids: list[int] = []
    rope: list[int] = []
    query_lens: list[int] = []
    seq_lens: list[int] = []
    rows: list[int] = []
    for item in batch.items:
        sequence, start, end, begin = item.sequence, item.start, item.end, len(ids)
        ids.extend(item.token_ids)
        rope.extend(range(sequence.rope_offset + start, sequence.rope_offset + end))
        query_lens.append(item.num_new_tokens)
        seq_lens.append(end)
        rows.extend(begin + place - 1 - start for place in item.places)
    return ForwardBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        rope_positions=torch.tensor(rope, dtype=torch.int64, device=device),
        pools=tuple(_tables(batch, number, place, block_size, device) for number, place in enumerate(places)),
        query_lens=query_lens,
        seq_lens=seq_lens,
        num_decodes=batch.num_decodes,
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        states=[SequenceState(*item.state) for item in batch.items if item.state is not None] or None,
    )


def _tables(batch: ScheduledBatch, pool: int, place: Place, block_size: int, device: torch.device) -> PoolTables:
    slots: list[int] = []
    tables = [item.sequence.block_tables[pool] for item in batch.items]
    for item, table in zip(batch.items, tables, strict=True):
        first = item.start // block_size
        ids = place.ids(table[first : -(-item.end // block_size)])
        slots.extend(ids[at // block_size - first] * block_size + at % block_size for at in range(item.start, item.end))
    width = max(map(len, tables))
    padded = [place.ids(table) + [0] * (width - len(table)) for table in tables]
    return PoolTables(
        torch.tensor(slots, dtype=torch.int64, device=device), torch.tensor(padded, dtype=torch.int32, device=device)
    )
