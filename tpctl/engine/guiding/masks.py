"""Which tokens a step's rows may be given, on every rank: found on rank 0's host while its device computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.engine.guiding.guides import Guides
from tpctl.engine.guiding.mask_threads import Finding
from tpctl.engine.scheduling.scheduled import ScheduledBatch


@dataclass
class PendingMasks:
    """Of a step: which sequences have grammars, by their ids, and on rank 0 what is being found for them."""

    ids: list[str]
    found: list[Finding] | None = None


class Masks:
    """One rank's. ``guides``: rank 0's."""

    def __init__(self, group: TPGroup, vocab_size: int) -> None:
        self.guides: Guides | None = None
        self._group = group
        self._width = -(-vocab_size // 32) + 1

    def begin(self, batch: ScheduledBatch) -> PendingMasks | None:
        """Start to find what a step's sequences may be given; ``None``: none has a grammar. Waits for nothing."""
        items = [item for item in batch.sampled if item.sequence.params.guide is not None]
        if not items:
            return None
        pending = PendingMasks([item.sequence.id for item in items])
        if self._group.rank == 0:
            assert self.guides is not None
            pending.found = self.guides.begin(items, self._width - 1)
        return pending

    def finish(self, pending: PendingMasks | None) -> dict[str, Tensor]:
        """What was found (collective where there is something), by sequence: int32 [W + 1] on the device, as
        ``SamplingRow.allowed`` has it. Waits for ``PATIENCE`` seconds at most."""
        if pending is None:
            return {}
        device = self._group.device
        if pending.found is None:
            words = torch.empty((len(pending.ids), self._width), dtype=torch.int32, device=device)
        else:
            assert self.guides is not None
            rows = self.guides.finish(pending.found)
            words = torch.from_numpy(rows.view(np.int32)).to(device)
        return dict(zip(pending.ids, self._group.broadcast(words).unbind(0), strict=True))
