"""The tensors of a checkpoint, as the plan sees them."""

from __future__ import annotations

from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.partition.plan import PartitionPlan
from tpctl.sharding.moving.layout import Stored, whole


def source_tensors(folder: CheckpointFolder, plan: PartitionPlan) -> dict[str, Stored]:
    """Every tensor of ``folder`` by name; those that ``plan`` takes for stacks of experts have one for each."""
    return {name: whole(info, file.path, stacked=name in plan.stacks) for name, (file, info) in folder.tensors.items()}
