"""Where a sequence's state lies on the device.

Block tables change little from step to step, so each sequence keeps a row ("slot") of a table on the device, and a
step sends only the blocks that are new, and once what sampling and rotation need, all in one copy. Slots are given out
when a sequence is first computed and taken back when they run out and their sequences have ended or been preempted.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass

import torch

from tpctl.engine.sampling.noise import seed_state
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.kernels.sampling.floors import MAX_TOP_K
from tpctl.kernels.sampling.prepare import SlotTables
from tpctl.layers.attention.base import Place


@dataclass
class _Slot:
    index: int
    sequence: Sequence
    admission: int
    num_slots: int = 0  # the sequence's, when its tables were last sent
    written: tuple[int, ...] = ()  # blocks of each that are on the device

    @property
    def stale(self) -> bool:
        return self.sequence.finished or self.sequence.admissions != self.admission or not self.sequence.block_tables


class Slots:
    """Slots for ``count`` sequences of at most ``max_blocks`` blocks in each pool, whose blocks lie at ``places``."""

    def __init__(
        self, count: int, max_blocks: int, device: torch.device, places: SequenceType[Place] = (Place(),)
    ) -> None:
        self.device = device
        self.count = count
        self.max_blocks = max_blocks
        self.places = tuple(places)
        self._first = SlotTables.first_block(count)
        size = self._first + len(self.places) * count * max_blocks
        self._cells = torch.zeros(size, dtype=torch.int32, device=device)
        self.tables = SlotTables.of(self._cells, count, len(self.places))
        self._free = list(range(count))
        self._held: dict[str, _Slot] = {}

    def update(self, items: Iterable[ScheduledSequence]) -> list[int]:
        """The slot of each item's sequence, its block table and sampling state on the device once the queued copies
        have run."""
        indices = []
        cells: list[int] = []
        numbers: list[int] = []
        for item in items:
            sequence = item.sequence
            slot = self._held.get(sequence.id)
            if slot is None or slot.sequence is not sequence or slot.admission != sequence.admissions:
                slot = self._take(sequence)
                cells += SlotTables.cells_of(slot.index, self.count)
                numbers += self._state(sequence)
            if slot.num_slots != sequence.num_slots:
                self._append(slot, cells, numbers)
            indices.append(slot.index)
        if cells:
            both = self._send(torch.tensor([cells, numbers], dtype=torch.int32))
            self._cells.index_copy_(0, both[0].long(), both[1])
        return indices

    def _append(self, slot: _Slot, cells: list[int], numbers: list[int]) -> None:
        """Add what is new in a sequence's tables, and where it goes. What windows have passed since stays there: no
        kernel reads it."""
        tables = slot.sequence.block_tables
        written = slot.written or (0,) * len(tables)
        for pool, (table, place, start) in enumerate(zip(tables, self.places, written, strict=True)):
            first = self._first + (pool * self.count + slot.index) * self.max_blocks
            cells.extend(range(first + start, first + len(table)))
            numbers.extend(place.ids(table[start:]))
        slot.written, slot.num_slots = tuple(map(len, tables)), slot.sequence.num_slots

    def _take(self, sequence: Sequence) -> _Slot:
        old = self._held.pop(sequence.id, None)
        if old is not None:
            self._free.append(old.index)
        if not self._free:
            for id, slot in list(self._held.items()):
                if slot.stale:
                    del self._held[id]
                    self._free.append(slot.index)
        slot = _Slot(self._free.pop(), sequence, sequence.admissions)
        self._held[sequence.id] = slot
        return slot

    def _state(self, sequence: Sequence) -> list[int]:
        """What a sequence's sampling and rotation need, which does not change."""
        p = sequence.params
        filters = (p.temperature, min(p.top_k, MAX_TOP_K), p.top_p, p.min_p)
        return SlotTables.packed(seed_state(p.seed), filters, sequence.rope_offset)

    def _send(self, host: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)
