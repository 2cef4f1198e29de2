"""A blueprint whose linears are stored as a quantised format has them, and are cut where its units end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd, lcm

from tpctl.arch.block import Attention, Block, Experts, Gated, Layer, LayerPart, Mixer, linears, with_weights
from tpctl.arch.blueprint import Blueprint, renamed
from tpctl.arch.formats.mxfp4 import MXFP4
from tpctl.arch.formats.scheme import Scheme
from tpctl.arch.formats.skipped import is_stack
from tpctl.arch.linear import Linear, Weight
from tpctl.arch.predictor import Predictor
from tpctl.errors import PartitionError, UnsupportedModelError
from tpctl.partition.cuts import Blocks, Cut, Dealt, Even, Scaled, Whole, Within
from tpctl.partition.split import EACH, Rule


@dataclass(frozen=True)
class Cutting:
    """How a model is cut, where there is a choice.

    Attributes:
        expert_parallel: groups of ranks that whole experts are dealt to, each group cutting its own; 1: every rank has
            a part of every expert.
        engine: another engine that shall load the shards, too, and has names of its own for some tensors.
        even: a border may fall inside a block that has one scale, which both sides then have, so that all ranks get
            as much; otherwise borders are where blocks end.
        predicts: the layer that predicts one token more is cut, too, where there is one; shards of a tpctl that left it
            out, and those for another engine, have none.
    """

    expert_parallel: int = 1
    even: bool = False
    engine: str | None = None
    predicts: bool = True


def quantised(blueprint: Blueprint, scheme: Scheme) -> Blueprint:
    """``blueprint`` with each linear stored as ``scheme`` says.

    Raises:
        UnsupportedModelError: linears that are merged into one are stored differently, or the format is one of
            stacked experts, of which the model has none.
    """
    sources = (part.source for linear in _linears(blueprint) for part in linear.parts)
    if isinstance(scheme, MXFP4) and not any(map(is_stack, sources)):
        raise UnsupportedModelError(
            "config.json: the weights are MXFP4, which tpctl knows of stacked experts alone, as gpt_oss has them, and "
            "this model has none such; use it in another format, or its unquantised original"
        )

    def names(source: str) -> list[str]:
        return [renamed(source.replace(EACH, "0"), root) for root in blueprint.roots]

    def stored(prefix: str, linear: Linear) -> Linear:
        found = {part.source: scheme.storage(names(prefix + part.source)) for part in linear.parts}
        if len(set(found.values())) > 1:
            words = [f"{name} is {kind.format if kind else 'a float'}" for name, kind in found.items()]
            raise UnsupportedModelError(
                f"the weights of {prefix}{linear.name} are stored as one, but {', '.join(words)}; they have to be alike"
            )
        storage = next(iter(found.values()))
        if storage is not None and linear.bias:  # which is the one that some formats may bring with them
            storage = replace(storage, entries=tuple(entry for entry in storage if entry.name != "bias"))
        return linear if storage is None else replace(linear, storage=storage)

    def changed(prefix: str, old: Layer) -> Layer:
        return mapped(old, lambda part: with_linears(part, lambda linear: stored(prefix, linear)))

    further = blueprint.further
    if further is not None:
        projection, block_source = stored(further.source, further.projection), further.block_source
        further = further.changed(projection, lambda block: changed(block_source, block))
    return replace(
        blueprint,
        layers=tuple(changed(blueprint.prefix.format(number), old) for number, old in enumerate(blueprint.layers)),
        further=further,
        beside=tuple(with_linears(part, lambda linear: stored("", linear)) for part in blueprint.beside),
        unused=(*blueprint.unused, *scheme.unused),
    )


def cut_by(blueprint: Blueprint, cutting: Cutting) -> Blueprint:
    """``blueprint`` with borders where the units of its storage end, and its experts dealt as ``cutting`` says.

    Raises:
        PartitionError: experts are to be dealt, and there are none, or too few.
    """
    counts = [part.count for layer in blueprint.layers for part in layer.parts if isinstance(part, Experts)]
    if cutting.expert_parallel > 1 and not counts:
        raise PartitionError(
            "the model has no experts that could be dealt to the ranks; leave --ep and --expert-parallel out"
        )
    if cutting.expert_parallel > min(counts, default=1):
        raise PartitionError(
            f"{cutting.expert_parallel} groups of ranks cannot share {min(counts)} experts; "
            f"use an --ep of at most {min(counts)} that divides --tp"
        )
    if cutting.expert_parallel == 1 and all(one.storage.is_dense for one in _linears(blueprint)):
        return blueprint

    def cut(part: LayerPart) -> LayerPart:
        return part_cut(part, cutting)

    further = None if blueprint.further is None else predictor_mapped(blueprint.further, cut)
    return replace(blueprint, layers=tuple(mapped(layer, cut) for layer in blueprint.layers), further=further)


def has_static_inputs(blueprint: Blueprint) -> bool:
    """Whether the checkpoint says by what to scale inputs that are rounded, which tpctl finds anew for each token."""
    storages = (linear.storage for linear in _linears(blueprint))
    rounding = (one for one in storages if one.coding is not None and one.coding.rounds)
    return any(entry.role == "inputs" and not entry.name.startswith("output") for one in rounding for entry in one)


def predictor_mapped(predictor: Predictor, change: Callable[[LayerPart], LayerPart]) -> Predictor:
    """``predictor`` with its projection, and each part of its block, changed."""
    return predictor.changed(change(predictor.projection), lambda block: mapped(block, change))


def part_cut(part: LayerPart, cutting: Cutting) -> LayerPart:
    """``part`` of a layer as ``cut_by`` has it, whether it was cut by ``cutting`` before or not."""
    if isinstance(part, Gated):
        gate_up, down = _aligned(part.gate_up, part.down, cutting)
        return replace(part, gate_up=gate_up, down=down)
    if isinstance(part, Experts):
        gate_up, down = _dealt(_aligned(part.gate_up, part.down, cutting), cutting.expert_parallel)
        forms = (
            (*_dealt(_aligned(one, other, cutting), cutting.expert_parallel), router)
            for one, other, router in part.forms
        )
        shared = None if part.shared is None else part_cut(part.shared, cutting)
        assert shared is None or isinstance(shared, Gated)
        return replace(part, gate_up=gate_up, down=down, forms=tuple(forms), shared=shared)
    if isinstance(part, Linear) and isinstance(part.input_cut, Even | Blocks):  # between parts, as a predictor's
        unit, word = part.storage.inp_unit, part.storage.inp_word
        return replace(part, input_cut=Even() if unit == 1 else Blocks(unit, word, cutting.even))
    return part


def _linears(blueprint: Blueprint) -> Iterator[Linear]:
    """The linears of all layers, experts' in every form that a checkpoint may have them in."""
    for layer in (*blueprint.layers, *(() if blueprint.further is None else (blueprint.further.block,))):
        for part in layer.parts:
            yield from linears(part)
            if isinstance(part, Experts):
                yield from (one for gate_up, down, _ in part.forms for one in (gate_up, down))


def mapped(layer: Layer, change: Callable[[LayerPart], LayerPart]) -> Layer:
    """``layer`` with each part changed; what is the same stays the same object."""
    if isinstance(layer, Block):
        attention, mlp = change(layer.attention), change(layer.mlp)
        assert isinstance(attention, Attention | Mixer) and isinstance(mlp, Gated | Experts)
        experts, own = layer.experts, layer.input
        if experts is not None:
            mixture = change(experts.experts)
            assert isinstance(mixture, Experts)
            experts = replace(experts, experts=mixture)
        if own is not None:
            gate, projection = change(own.gate), change(own.projection)
            assert isinstance(gate, Linear) and isinstance(projection, Linear)
            own = replace(own, gate=gate, projection=projection)
        return replace(layer, attention=attention, mlp=mlp, experts=experts, input=own)
    parts = tuple(change(part) for part in layer.parts)
    mixer = next(new for new, old in zip(parts, layer.parts, strict=True) if old is layer.mixer)
    assert isinstance(mixer, Attention | Mixer)
    return replace(layer, mixer=mixer, parts=parts)


def with_linears(part: LayerPart, change: Callable[[Linear], Linear]) -> LayerPart:
    """``part`` with its linears changed, but for routers and tables of embeddings, which no format quantises."""
    routers = (part.router, *(router for _, _, router in part.forms)) if isinstance(part, Experts) else ()

    def changed(one: Weight) -> Weight:
        chooses = any(one is weight for router in routers for weight in router)
        return change(one) if isinstance(one, Linear) and one.rule is not Rule.VOCAB and not chooses else one

    return with_weights(part, changed)


def _aligned(gate_up: Linear, down: Linear, cutting: Cutting) -> tuple[Linear, Linear]:
    """Both with one cut of the width between them: where units of either end, if there are any."""
    width = gate_up.parts[0].cut
    if isinstance(width, Within):
        width = width.cut
    factor = width.factor if isinstance(width, Scaled) else 1  # gate and up side by side
    unit = lcm(_per(gate_up.storage.out_unit, factor), down.storage.inp_unit)
    word = lcm(_per(gate_up.storage.out_word, factor), down.storage.inp_word)
    cut: Cut = Even() if unit == 1 else Blocks(unit, word, cutting.even)
    beside: Cut = cut if factor == 1 else Scaled(cut, factor)
    parts = tuple(replace(part, cut=beside) for part in gate_up.parts)
    return replace(gate_up, parts=parts), replace(down, input_cut=cut)


def _per(unit: int, factor: int) -> int:
    """The unit of an axis, of one on which ``factor`` entries stand for each of its own."""
    return unit // gcd(unit, factor)


def _dealt(pair: tuple[Linear, Linear], groups: int) -> tuple[Linear, Linear]:
    """Both with whole experts dealt to groups of ranks."""
    if groups == 1:
        return pair
    gate_up, down = (
        replace(
            one,
            stack=None if one.stack is None else replace(one.stack, cut=Dealt(groups)),
            parts=tuple(replace(part, cut=_within(part.cut, groups)) for part in one.parts),
            input_cut=_within(one.input_cut, groups),
        )
        for one in pair
    )
    return gate_up, down


def _within(cut: Cut, groups: int) -> Cut:
    return cut if isinstance(cut, Whole) else Within(cut, groups)
