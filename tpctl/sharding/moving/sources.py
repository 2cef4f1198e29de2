"""The tensors of a checkpoint, as the plan sees them."""

from __future__ import annotations

from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import EACH, TensorSplit, tensor_names
from tpctl.sharding.moving.layout import Stored, pile, whole


class SourceTensors:
    """What to read of the checkpoint ``folder`` for each stored tensor of ``plan``."""

    def __init__(self, folder: CheckpointFolder, plan: PartitionPlan) -> None:
        self._folder, self._stacks = folder, plan.stacks

    def __getitem__(self, name: str) -> Stored:
        """A tensor of the checkpoint."""
        file, info = self._folder.tensors[name]
        return whole(info, file.path, stacked=name in self._stacks)

    def of(self, split: TensorSplit) -> tuple[Stored, ...]:
        """Those that ``split`` is made of; of experts one pile for each projection."""
        return tuple(self._source(source, split) for source in dict.fromkeys(part.source for part in split.parts))

    def _source(self, source: str, split: TensorSplit) -> Stored:
        if split.stack is None or EACH not in source:
            return self[source]
        found = (self._folder.tensors[name] for name in tensor_names(source, split.stack.count))
        return pile(source, [(info, file.path) for file, info in found])
