"""What a shard folder must hold, by its plan and not by its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tpctl.arch.compat import constants
from tpctl.arch.config import ModelConfig
from tpctl.manifest.records import ManifestTensor
from tpctl.partition.plan import PartitionPlan, PlannedTensor


@dataclass(frozen=True)
class Expected:
    """What the ranks of a shard folder hold if it is cut by ``plan``.

    Attributes:
        shards: each rank's stored tensors by name, constants of another engine included.
        fills: the value of those that are made of no source tensor and are not zero.
    """

    shards: tuple[Mapping[str, PlannedTensor], ...]
    fills: Mapping[str, int]

    @classmethod
    def of(cls, config: ModelConfig, plan: PartitionPlan, compat: str | None) -> Expected:
        """By ``plan``, and by what the engine ``compat`` wants beside it."""
        more = constants(compat, config)
        planned = {name: tensor for name, (tensor, _) in more.items()}
        fills = {name: value for name, (_, value) in more.items()}
        return cls(tuple({**shard, **planned} for shard in plan.shards), fills)

    def differing(self, rank: int, name: str, entry: ManifestTensor) -> list[str]:
        """The fields of a manifest's ``entry`` that differ; part, dtype and digest are none of the plan's."""
        wanted = self.shards[rank][name]
        pairs = {
            "rule": (entry.rule, wanted.rule),
            "dim": (entry.dim, wanted.dim),
            "shape": (entry.shape, wanted.shape),
            "pieces": (entry.pieces, wanted.pieces),
            "stack": (entry.stacked, wanted.stacked),
            "fill": (entry.fill, self.fills.get(name, 0)),
        }
        return [field for field, (found, planned) in pairs.items() if found != planned]
