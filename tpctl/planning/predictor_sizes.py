"""How large a layer that predicts one token more is on each rank (``arch.predictor``), where it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from tpctl.accounting import KeptLayer
from tpctl.arch.block import Attention, Mixer
from tpctl.arch.config import ModelConfig
from tpctl.arch.predictor import PREFIX
from tpctl.arch.quantised import Cutting, cut_by
from tpctl.arch.source_plan import source_splits
from tpctl.partition.dtypes import DTYPE_BITS
from tpctl.partition.plan import PartitionPlan, PlannedTensor


@dataclass(frozen=True)
class PredictorSizes:
    """Those of the layer that ``config`` has, if any.

    Attributes:
        names: of the checkpoint's tensors.
        dtypes: the safetensors dtypes of stored ones.
        cutting: how the model is cut at each size.
    """

    config: ModelConfig
    names: Collection[str]
    dtypes: Mapping[str, str]
    cutting: Callable[[int], Cutting]

    def shards(self, tp_size: int) -> tuple[Mapping[str, PlannedTensor], ...]:
        """Each rank's tensors."""
        cutting, config = self.cutting(tp_size), self.config
        if cutting != Cutting():
            config = replace(config, blueprint=cut_by(config.blueprint, cutting), cutting=cutting)
        splits = [] if config.blueprint.predictor is None else source_splits(config, self.names)
        return PartitionPlan.build([split for split in splits if split.name.startswith(PREFIX)], tp_size).shards

    def nbytes(self, tp_size: int, rank: int) -> int:
        """What its weights take."""
        shard = self.shards(tp_size)[rank]
        return sum(stored.numel * DTYPE_BITS[self.dtypes[name]] for name, stored in shard.items()) // 8

    def token_bytes(self, tp_size: int, rank: int, itemsize: int) -> int:
        """What it keeps of a token, in a cache of numbers of ``itemsize`` bytes."""
        predictor = self.config.blueprint.predictor
        if predictor is None:
            return 0
        mixer = predictor.block.mixer
        return kept_of(mixer, len(mixer.shares(tp_size)[rank].kv)).token_bytes(itemsize, "model")


def kept_of(mixer: Attention | Mixer, heads: int) -> KeptLayer:
    """What so many KV heads of a layer keep of a token."""
    if isinstance(mixer, Attention):
        return KeptLayer(mixer.window, 2 * heads, mixer.head_dim)
    return KeptLayer(None, heads, mixer.kept, whole=True)
