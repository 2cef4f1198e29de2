"""What each stored tensor is of: a weight's values, or numbers that belong to them, as its format says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tpctl.arch.block import linears
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.linear import Linear
from tpctl.arch.storage import Axis, Entry, Storage
from tpctl.partition.split import Rule


@dataclass(frozen=True)
class Meaning:
    """What a stored tensor is of.

    Attributes:
        weight: the linear's stored name, which all tensors of one weight share; empty: it is of none.
        format: of that weight's storage.
        values: it holds the weight itself; the others of that weight belong to it.
        holds: what one entry stands for, in words; empty: a value.
        axes: what there is an entry for, along each axis.
        weights: how many of the model's weights one entry is.
    """

    weight: str = ""
    format: str = ""
    values: bool = True
    holds: str = ""
    axes: tuple[str, ...] = ()
    weights: float = 1


def meanings(blueprint: Blueprint) -> Mapping[str, Meaning]:
    """By the name of the stored tensor; ``blueprint`` has its experts as the checkpoint has them."""
    vocabulary = map(blueprint.stored_name, (blueprint.embedding, blueprint.head))
    found = {name: Meaning(axes=("tokens", "features")) for name in vocabulary}
    for prefix, _, part in blueprint.placed():
        for linear in linears(part):
            if linear.rule is not Rule.VOCAB:  # a table of embeddings
                found.update((prefix + name, meaning) for name, meaning in _of_linear(linear, prefix))
    return found


def values_of(storage: Storage) -> Entry:
    """The tensor of a stored weight that holds its values: the one with an entry for the fewest of them, since a scale
    is of many."""
    both = [entry for entry in storage if entry.out is not None and entry.inp is not None]
    return min(both or storage.entries, key=_features)


def features(linear: Linear, shape: Sequence[int]) -> tuple[int, int]:
    """The output and input features of which a rank holds the values, in a tensor of ``shape``."""
    entry = values_of(linear.storage)
    inner = shape[linear.stack is not None :]
    assert entry.out is not None and entry.inp is not None
    return inner[entry.out.dim] * entry.out.unit, inner[entry.inp.dim] * entry.inp.unit


def _of_linear(linear: Linear, prefix: str) -> Iterator[tuple[str, Meaning]]:
    values = values_of(linear.storage)
    experts = ("experts",) if linear.stack is not None else ()
    for entry in linear.storage:
        axes = (*experts, *_axes(entry))
        meaning = Meaning(
            prefix + linear.name, linear.storage.format, entry is values, _holds(entry), axes, entry.weights
        )
        yield f"{linear.name}{linear.joiner}{entry.name}", meaning
    if linear.bias:
        yield f"{linear.name}{linear.joiner}bias", Meaning(axes=(*experts, "outputs"))


def _features(entry: Entry) -> int:
    return prod(axis.unit for axis in (entry.out, entry.inp) if axis is not None)


def _holds(entry: Entry) -> str:
    """``"a block of 128 x 128"``, ``"8 packed values"``, ``"8 packed values, each of a group of 128 inputs"``, …"""
    packed = prod(axis.unit for axis in (entry.out, entry.inp) if axis is not None and axis.packed)
    region = _region(_unit(entry.out), _unit(entry.inp))
    if packed == 1:
        return region
    words = f"{packed} packed values" + (f", each of {region}" if region else "")
    return words + (f", in {prod(entry.tail)} numbers" if entry.tail else "")


def _unit(axis: Axis | None) -> int | None:
    """How many features an entry says something about; ``None``: about all."""
    return None if axis is None else 1 if axis.packed else axis.unit


def _region(out: int | None, inp: int | None) -> str:
    match out, inp:
        case None, None:
            return "the whole weight"
        case None, _:
            return "an input" if inp == 1 else f"{inp} inputs"
        case _, None:
            return "an output" if out == 1 else f"{out} outputs"
        case 1, 1:
            return ""
        case 1, _:
            return f"a group of {inp} inputs"
        case _, 1:
            return f"a group of {out} outputs"
        case _:
            return f"a block of {out} x {inp}"


def _axes(entry: Entry) -> tuple[str, ...]:
    found = {axis.dim: _axis(axis, word) for axis, word in ((entry.out, "outputs"), (entry.inp, "inputs")) if axis}
    return (*(found[dim] for dim in sorted(found)), *("numbers" for _ in entry.tail)) or ("parts",)


def _axis(axis: Axis, word: str) -> str:
    if axis.unit == 1:
        return word
    return f"{'words' if axis.packed else 'blocks'} of {axis.unit} {word}"
