"""Turns a scheduled step into the tensors of a ``ForwardBatch``."""

from __future__ import annotations

import torch

from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.layers.batch import ForwardBatch, SequenceState


def build_forward_batch(batch: ScheduledBatch, block_size: int, device: torch.device) -> ForwardBatch:
    """Token ids, rotary rows, slots and block tables of ``batch``; all its tokens must be known on the host."""
    ids: list[int] = []
    rope: list[int] = []
    slots: list[int] = []
    query_lens: list[int] = []
    seq_lens: list[int] = []
    rows: list[int] = []
    tables = [item.sequence.block_table for item in batch.items]
    for item in batch.items:
        sequence, start = item.sequence, item.start
        end = start + item.num_new_tokens
        ids.extend(sequence.token_ids[start:end])
        rope.extend(range(sequence.rope_offset + start, sequence.rope_offset + end))
        table = sequence.block_table
        slots.extend(table[at // block_size] * block_size + at % block_size for at in range(start, end))
        query_lens.append(item.num_new_tokens)
        seq_lens.append(end)
        if item.samples:
            rows.append(len(ids) - 1)
    width = max(len(table) for table in tables)
    padded = [table + [0] * (width - len(table)) for table in tables]
    return ForwardBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        rope_positions=torch.tensor(rope, dtype=torch.int64, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        query_lens=query_lens,
        seq_lens=seq_lens,
        num_decodes=batch.num_decodes,
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        states=[SequenceState(*item.state) for item in batch.items if item.state is not None] or None,
    )
