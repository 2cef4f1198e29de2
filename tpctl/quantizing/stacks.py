"""Experts that a checkpoint stacks in one tensor, as the weights that they are quantised as: one for each expert.

compressed-tensors has linears, of two axes, so a stack is divided into them, with the names that the family has for
experts one by one: those are what other engines read in its quantised form (transformers 5.24,
``conversion_mapping.py``; vLLM 0.33, ``fused_moe/routed_experts.py``: its ``load_weights``). Bytes stay where they are
in a stack: the rows of an expert's weight are next to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tpctl.arch.block import Experts
from tpctl.arch.blueprint import renamed
from tpctl.arch.config import ModelConfig
from tpctl.arch.formats.skipped import is_stack
from tpctl.arch.linear import Linear, Vector
from tpctl.arch.source_plan import as_held
from tpctl.errors import CheckpointError
from tpctl.partition.split import EACH
from tpctl.quantizing.schemes import Method


@dataclass(frozen=True)
class Weight:
    """A linear's weight [N, K]: the rows of a stored tensor from row ``first`` on, its leading axes seen as one."""

    name: str
    shape: tuple[int, int]
    first: int = 0


@dataclass(frozen=True)
class Unstacked:
    """What a checkpoint's stacks are divided into, by their names; and tensors that have other names beside experts
    that are not stacked (Mixtral's router)."""

    weights: Mapping[str, tuple[Weight, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def unstacked(folder: Path, shapes: Mapping[str, tuple[int, ...]], method: Method) -> Unstacked:
    """The stacks among tensors of ``shapes``, by ``folder/config.json``, which is read only if there may be some.

    Raises:
        CheckpointError: the family has no form with one tensor an expert, or a stack is not of the config's shape.
        UnsupportedModelError: tpctl does not know the model.
    """
    if not any(map(is_stack, shapes)):
        return Unstacked()
    config = ModelConfig.load(folder)
    blueprint, held = config.blueprint, as_held(config, shapes).blueprint
    root = blueprint.root(shapes)
    weights: dict[str, tuple[Weight, ...]] = {}
    names: dict[str, str] = {}
    for number, (known, found) in enumerate(zip(blueprint.layers, held.layers, strict=True)):
        prefix = blueprint.prefix.format(number)
        for one, part in zip(known.parts, found.parts, strict=True):
            if not isinstance(one, Experts) or not isinstance(part, Experts) or _is_apart(part.gate_up):
                continue
            stacks = {renamed(prefix + linear.parts[0].source, root): linear for linear in (part.gate_up, part.down)}
            if missing := stacks.keys() - shapes.keys():
                raise CheckpointError(f"the checkpoint has no tensor {min(missing)}; it is incomplete")
            gate_up, down, router = _apart(config, one, next(iter(stacks)), method)
            for (source, linear), into in zip(stacks.items(), (gate_up, down), strict=True):
                weights[source] = tuple(_divided(source, shapes[source], linear, into, prefix, root))
            for old, new in zip(part.router, router, strict=True):
                names |= dict(zip(_tensors(old, prefix, root), _tensors(new, prefix, root), strict=True))
    return Unstacked(weights, {old: new for old, new in names.items() if old != new and old in shapes})


def _is_apart(linear: Linear) -> bool:
    return EACH in linear.parts[0].source


def _apart(
    config: ModelConfig, experts: Experts, stack: str, method: Method
) -> tuple[Linear, Linear, tuple[Linear | Vector, ...]]:
    """The form of ``experts`` that has one tensor for each."""
    for form in ((experts.gate_up, experts.down, experts.router), *experts.forms):
        if _is_apart(form[0]):
            return form
    raise CheckpointError(
        f"{stack} is a stack of experts, which --quantize {method} divides into one tensor an expert, but "
        f"{config.model_type} has no such form that other engines read; leave out --quantize"
    )


def _divided(
    source: str, shape: tuple[int, ...], stack: Linear, into: Linear, prefix: str, root: str
) -> Iterator[Weight]:
    """Every expert's weights of ``into``, in the order of the rows of ``source``."""
    assert stack.stack is not None
    count, rows, columns = stack.stack.count, stack.outputs, stack.inputs
    if shape != (count, rows, columns):
        raise CheckpointError(
            f"tensor {source} is {list(shape)} in the checkpoint but {[count, rows, columns]} by config.json; the two "
            "do not belong together"
        )
    by_label = {part.label: part for part in into.parts}
    for expert in range(count):
        for part in stack.parts:
            name = renamed(prefix + by_label[part.label].source.replace(EACH, str(expert)), root)
            yield Weight(f"{name}.weight", (part.length, columns), expert * rows + part.offset)


def _tensors(part: Linear | Vector, prefix: str, root: str) -> Iterable[str]:
    """The names in a checkpoint of what chooses experts."""
    if isinstance(part, Vector):
        return (renamed(prefix + (part.source or part.name), root),)
    source = renamed(prefix + part.parts[0].source, root)
    return (f"{source}.weight", f"{source}{part.bias_suffix}")
