"""The partition plan of a checkpoint as it is stored, and into what parts it is cut by default.

Apart from ``shard``, so that planning a model loads nothing that moves bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tpctl.models.config import ModelConfig
from tpctl.models.weights import EMBEDDING, LM_HEAD, weight_splits
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import TensorSplit

DEFAULT_PART_SIZE = 5 * 10**9
"""Bytes of tensors in one part file, as Hugging Face checkpoints have it."""


def source_splits(config: ModelConfig, names: Iterable[str]) -> list[TensorSplit]:
    """The split of every stored tensor, for a checkpoint that holds tensors ``names``.

    With tied embeddings a checkpoint may keep the one copy under the head's name; the head is then read from there.
    """
    splits, held = list(weight_splits(config)), set(names)
    if config.tie_word_embeddings and LM_HEAD in held and EMBEDDING not in held:
        head = splits[-1]
        splits[-1] = replace(head, blocks=tuple(replace(block, source=LM_HEAD) for block in head.blocks))
    return splits


def source_plan(config: ModelConfig, names: Iterable[str], tp_size: int) -> PartitionPlan:
    """The partition plan for a checkpoint that holds tensors ``names`` (see ``source_splits``).

    Raises:
        PartitionError: the model cannot be cut into ``tp_size`` shards.
    """
    return PartitionPlan.build(config.geometry, source_splits(config, names), tp_size)
