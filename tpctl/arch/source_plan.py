"""The partition plan of a model, and of a checkpoint as it is stored."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from tpctl.arch.block import Experts, LayerPart, linears
from tpctl.arch.blueprint import ROOT, renamed
from tpctl.arch.config import ModelConfig
from tpctl.arch.foreign import check_tensors
from tpctl.arch.formats.skipped import is_stack
from tpctl.arch.linear import Linear
from tpctl.arch.predictor import Predictor
from tpctl.arch.quantised import Cutting, mapped, part_cut, predictor_mapped, with_linears
from tpctl.arch.storage import DENSE, FUSED
from tpctl.errors import CheckpointError, MixedDtypesError, UnsupportedModelError, counted
from tpctl.partition.dtypes import DTYPES, FLOATS, dtype_after_cast
from tpctl.partition.plan import PartitionPlan, Shape
from tpctl.partition.split import EACH, TensorSplit

DEFAULT_PART_SIZE = 5 * 10**9
"""Bytes of tensors in one part file, as Hugging Face checkpoints have it."""


def build_plan(config: ModelConfig, tp_size: int) -> PartitionPlan:
    """The partition plan of a model for ``tp_size`` ranks.

    Raises:
        PartitionError: the model cannot be cut into that many shards.
    """
    return _plan(config, tuple(config.blueprint.splits()), tp_size)


def source_splits(config: ModelConfig, names: Collection[str]) -> list[TensorSplit]:
    """The split of every stored tensor, for a checkpoint that holds tensors ``names``.

    They tell what the config does not: the root of the names, whether experts are stacked, which optional tensors
    there are, and under which name the one copy of a tied embedding is.
    """
    blueprint = as_held(config, names).blueprint
    root = blueprint.root(names)
    splits = [_from(root, split) for split in blueprint.splits()]
    if blueprint.tied:
        embedding, head = (renamed(name, root) for name in (blueprint.embedding, blueprint.head))
        if head in names and embedding not in names:
            stored = blueprint.stored_name(blueprint.head)
            at = next(number for number, split in enumerate(splits) if split.name == stored)
            splits[at] = replace(splits[at], parts=tuple(replace(part, source=head) for part in splits[at].parts))
    return [split for split in splits if not split.optional or any(source in names for source in split.sources)]


def as_held(config: ModelConfig, names: Container[str]) -> ModelConfig:
    """``config`` with its layers, and what is beside them, in the form that a checkpoint with tensors ``names`` has
    them; with a predictor, if that has one."""
    blueprint = config.blueprint
    root = blueprint.root(names)
    layers = tuple(
        mapped(layer, partial(_as_held, config.cutting, prefix=blueprint.prefix.format(number), root=root, names=names))
        for number, layer in enumerate(blueprint.layers)
    )
    beside = tuple(_as_held(config.cutting, part, "", root, names) for part in blueprint.beside)
    predictor = None
    if blueprint.further is not None:
        predictor = predictor_held(blueprint.further, config.cutting, root, names)
    return replace(config, blueprint=replace(blueprint, layers=layers, beside=beside, predictor=predictor))


def predictor_held(further: Predictor, cutting: Cutting, root: str, names: Container[str]) -> Predictor | None:
    """``further`` in the form that a checkpoint with tensors ``names`` has it; ``None``: something is missing.

    Some quantised checkpoints leave it in floats, all of it or its projection, and do not say so: what has no scale
    beside it is a float.
    """

    def held(part: LayerPart) -> LayerPart:
        source = further.source if part is further.projection else further.block_source
        part = _as_held(cutting, part, source, root, names)
        floats = with_linears(part, lambda linear: _unquantised(linear, source, root, names))
        return part_cut(floats, cutting)

    found = predictor_mapped(further, held)
    splits = (_from(root, split) for split in found.splits() if not split.optional)
    sources = (part.source.replace(EACH, "0") for split in splits for part in split.parts)
    return found if all(source in names for source in sources) else None


def _unquantised(linear: Linear, prefix: str, root: str, names: Container[str]) -> Linear:
    """``linear`` in floats, if those are what a checkpoint with ``names`` has of it."""
    source = renamed(prefix + linear.parts[0].source.replace(EACH, "0"), root)
    plain = FUSED if is_stack(linear.parts[0].source) else DENSE
    there = all(source + entry.suffix in names for entry in linear.storage if not entry.optional)
    return linear if there or source + plain.entries[0].suffix not in names else replace(linear, storage=plain)


def unread(config: ModelConfig, names: Collection[str]) -> set[str]:
    """Those of a checkpoint's ``names`` that no rank needs (see ``Blueprint.unread``)."""
    return as_held(config, names).blueprint.unread(names)


def second_copies(config: ModelConfig, names: Container[str]) -> dict[str, str]:
    """Tensors of a checkpoint that are copies of another one, by name: a tied head beside the embedding."""
    blueprint = config.blueprint
    root = blueprint.root(names)
    embedding, head = (renamed(name, root) for name in (blueprint.embedding, blueprint.head))
    return {head: embedding} if blueprint.tied and head in names and embedding in names else {}


def towers(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that belong to what sees or hears, beside the text model."""
    patterns = config.blueprint.towers
    return list(filter(re.compile("|".join(patterns)).fullmatch, names)) if patterns else []


def check_text_only(config: ModelConfig, names: Iterable[str], text_only: bool) -> None:
    """Refuse ``names`` that hold what sees or hears, unless ``text_only`` says that it is known.

    Raises:
        UnsupportedModelError: they do.
    """
    if not text_only and (seen := towers(config, names)):
        raise UnsupportedModelError(
            f"the checkpoint also holds {counted(len(seen), 'tensor')} of what sees or hears, such as {seen[0]}, which "
            "tpctl does not run; cut the text model with --text-only (merge gives the rest back)"
        )


def _as_held(cutting: Cutting, part: LayerPart, prefix: str, root: str, names: Container[str]) -> LayerPart:
    """``part`` with its experts in the form, and its weights under the names, that a checkpoint with ``names`` has; cut
    where the units of those end."""

    def source(linear: Linear) -> str:
        return renamed(prefix + linear.parts[0].source.replace(EACH, "0"), root)

    def named(linear: Linear) -> Linear:
        held = linear.storage.held(source(linear), names)
        return linear if held is linear.storage else replace(linear, storage=held)

    if isinstance(part, Experts) and part.forms:
        for gate_up, down, router in ((part.gate_up, part.down, part.router), *part.forms):
            if source(gate_up) + gate_up.storage.entries[0].suffix in names:
                part = replace(part, gate_up=gate_up, down=down, router=router)
                break
    if any(linear.storage.others for linear in linears(part)):
        return part_cut(with_linears(part, named), cutting)
    return part


def _from(root: str, split: TensorSplit) -> TensorSplit:
    if root == ROOT:
        return split
    return replace(split, parts=tuple(replace(part, source=renamed(part.source, root)) for part in split.parts))


def source_plan(config: ModelConfig, names: Collection[str], tp_size: int) -> PartitionPlan:
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
    plan, ignored = source_plan(config, shapes, tp_size), unread(config, shapes)
    own = plan.source_shapes.keys()
    check_tensors(shapes.keys() - own - ignored, config.scheme is not None, own)
    plan.check_source(shapes, ignored)
    return plan


def stored_dtype(split: TensorSplit, sources: Mapping[str, str], target: str | None) -> str:
    """The safetensors dtype of the stored tensor of ``split``.

    Args:
        sources: the dtypes of the tensors that it is made of, by their names.
        target: what floats are cast to; ``None`` keeps them. Quantised values and their scales stay as they are.

    Raises:
        MixedDtypesError: they differ, and a cast would make them equal.
        CheckpointError: they are quantised, and differ, or one is none that the format has.
        UnsupportedModelError: one is no float: what it stands for, only its scales would say.
    """
    if split.dtypes is not None:
        for source, dtype in sources.items():
            if dtype not in split.dtypes:
                raise CheckpointError(
                    f"{source} is {dtype}, but its format has {' or '.join(split.dtypes)}; take the config.json that "
                    "belongs to the checkpoint, or fetch it again"
                )
        target = None
    elif strange := [source for source, dtype in sources.items() if dtype not in FLOATS]:
        raise UnsupportedModelError(
            f"{strange[0]} is {sources[strange[0]]}, but weights are floats; the checkpoint is quantised, without "
            "scales; use its unquantised original"
        )
    kept = {source: dtype_after_cast(dtype, target) for source, dtype in sources.items()}
    if len(set(kept.values())) == 1:
        return next(iter(kept.values()))
    (first, one), (second, other) = list({dtype: source for source, dtype in kept.items()}.items())[:2]
    differ = f"{one} is {first} but {other} is {second}; {split.name} cannot hold both"
    if split.dtypes is not None:
        raise CheckpointError(differ)
    raise MixedDtypesError(f"{differ}, cast with --dtype {', '.join(DTYPES)}")


def check_scaled(config: ModelConfig, splits: Iterable[TensorSplit], dtypes: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a quantised model's floats of 8 bits that no scale stands beside: at face value they are other weights.

    Where config.json has no ``quantization_config``, they are floats like any others.

    Args:
        dtypes: of the tensors that each stored tensor is made of, as ``stored_dtype`` takes them.

    Raises:
        UnsupportedModelError: there is one; the message names it.
    """
    if config.scheme is None:
        return
    for split in splits:
        if split.dtypes is None:
            for source, dtype in dtypes[split.name].items():
                if dtype.startswith("F8_"):
                    raise UnsupportedModelError(
                        f"{source} is {dtype} without a scale beside it, and by the quantization_config of config.json "
                        "it is not quantised; correct the modules that this leaves out, or use the unquantised original"
                    )


def _plan(config: ModelConfig, splits: Sequence[TensorSplit], tp_size: int) -> PartitionPlan:
    mixers = (config.blueprint.layers[layer].mixer for layer in config.blueprint.alike)
    for mixer in sorted(mixers, key=lambda one: one.num_heads):  # said first, in words of heads
        mixer.shares(tp_size)
    return PartitionPlan.build(splits, tp_size)
