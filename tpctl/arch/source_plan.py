"""The partition plan of a model, and of a checkpoint as it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tpctl.arch.config import ModelConfig
from tpctl.arch.foreign import check_tensors
from tpctl.errors import MixedDtypesError, UnsupportedModelError
from tpctl.partition.dtypes import DTYPES, FLOATS, dtype_after_cast
from tpctl.partition.plan import PartitionPlan, Shape
from tpctl.partition.split import TensorSplit

DEFAULT_PART_SIZE = 5 * 10**9
"""Bytes of tensors in one part file, as Hugging Face checkpoints have it."""


def build_plan(config: ModelConfig, tp_size: int) -> PartitionPlan:
    """The partition plan of a model for ``tp_size`` ranks.

    Raises:
        PartitionError: the model cannot be cut into that many shards.
    """
    return _plan(config, tuple(config.blueprint.splits()), tp_size)


def source_splits(config: ModelConfig, names: Iterable[str]) -> list[TensorSplit]:
    """The split of every stored tensor, for a checkpoint that holds tensors ``names``.

    With tied embeddings a checkpoint may keep the one copy under the head's name; the head is then read from there.
    """
    blueprint, held = config.blueprint, set(names)
    splits = list(blueprint.splits())
    if blueprint.tied and blueprint.head in held and blueprint.embedding not in held:
        head = splits[-1]
        splits[-1] = replace(head, parts=tuple(replace(part, source=blueprint.head) for part in head.parts))
    return splits


def source_plan(config: ModelConfig, names: Iterable[str], tp_size: int) -> PartitionPlan:
    """The partition plan for a checkpoint that holds tensors ``names`` (see ``source_splits``).

    Raises:
        PartitionError: the model cannot be cut into ``tp_size`` shards.
    """
    return _plan(config, source_splits(config, names), tp_size)


def checked_source_plan(config: ModelConfig, shapes: Mapping[str, Shape], tp_size: int) -> PartitionPlan:
    """The partition plan for a checkpoint with tensors of ``shapes``, every one of which it uses.

    Raises:
        PartitionError: as ``source_plan``.
        UnsupportedModelError: the tensors are those of a quantised model, an adapter or another architecture.
        CheckpointError: a tensor is missing, of another shape, or unknown.
    """
    plan, ignored = source_plan(config, shapes, tp_size), config.blueprint.ignored()
    check_tensors(shapes.keys() - plan.source_shapes.keys() - set(ignored))
    plan.check_source(shapes, ignored)
    return plan


def stored_dtype(name: str, sources: Mapping[str, str], target: str | None) -> str:
    """The safetensors dtype of stored tensor ``name``.

    Args:
        sources: the dtypes of the tensors that it is made of, by their names.
        target: what floats are cast to; ``None`` keeps them.

    Raises:
        MixedDtypesError: they differ, and a cast would make them equal.
        UnsupportedModelError: one is no float: what it stands for, only its scales would say.
    """
    if strange := [source for source, dtype in sources.items() if dtype not in FLOATS]:
        raise UnsupportedModelError(
            f"{strange[0]} is {sources[strange[0]]}, but weights are floats; the checkpoint is quantised, without "
            "scales; use its unquantised original"
        )
    kept = {source: dtype_after_cast(dtype, target) for source, dtype in sources.items()}
    if len(set(kept.values())) == 1:
        return next(iter(kept.values()))
    (first, one), (second, other) = list({dtype: source for source, dtype in kept.items()}.items())[:2]
    differ = f"{one} is {first} but {other} is {second}; {name} cannot hold both"
    raise MixedDtypesError(f"{differ}, cast with --dtype {', '.join(DTYPES)}")


def _plan(config: ModelConfig, splits: Sequence[TensorSplit], tp_size: int) -> PartitionPlan:
    for layer in config.blueprint.alike:  # said first, in words of heads
        config.blueprint.blocks[layer].attention.shares(tp_size)
    return PartitionPlan.build(splits, tp_size)
