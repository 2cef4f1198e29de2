"""What other engines need of a shard folder that they load with ``load_format="sharded_state"``.

Such a loader copies each stored tensor into the parameter of its name. A folder is right where every rank's tensors are
those that the engine's own loader fills its parameters with from the checkpoint. Models for which that was seen are
listed in ``arch.proven``; all else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from tpctl.arch import vllm
from tpctl.arch.block import Attention, Experts, Layer, linears
from tpctl.arch.blueprint import Blueprint, renamed
from tpctl.arch.config import ModelConfig
from tpctl.arch.linear import Linear
from tpctl.arch.proven import ENGINES, Engine, Format
from tpctl.arch.source_plan import as_held, build_plan
from tpctl.errors import PartitionError, UnsupportedModelError, UsageError
from tpctl.partition.plan import PartitionPlan, PlannedTensor
from tpctl.partition.split import Rule


def check_compat(
    engine: str,
    config: ModelConfig,
    plan: PartitionPlan,
    left: Collection[str] = (),
    without: str = "leave --compat out",
) -> None:
    """Check that ``engine`` is known and can load what ``plan`` makes.

    Args:
        left: tensors of the checkpoint that no rank has.
        without: what to do for a folder that no other engine loads.

    Raises:
        UsageError: the engine is unknown.
        PartitionError: the split is one that the engine does not make; the message names the sizes at which it does.
        UnsupportedModelError: nobody has proven it for such a model.
    """
    if engine not in ENGINES:
        raise UsageError(f"--compat {engine} is unknown; use {' or '.join(ENGINES)}")
    config = as_held(config, plan.source_shapes)
    if (why := _unproven(ENGINES[engine], config, plan, left)) is not None:
        raise UnsupportedModelError(f"--compat {engine} is not known to work for a model that has {why}; {without}")
    if (what := _unfit(config.blueprint, plan)) is not None:
        even = [tp for tp in range(1, config.blueprint.max_tp + 1) if _fits(config, tp)]
        advice = f"use --tp {', '.join(map(str, even))}, or {without}" if even else without
        raise PartitionError(f"{engine} loads only even splits, but at tp {plan.tp_size} {what}; {advice}")


def constants(engine: str | None, config: ModelConfig) -> dict[str, tuple[PlannedTensor, int]]:
    """What ``engine`` expects on every rank beyond the model's weights, by name: F32 tensors of 0 or 1."""
    if engine != "vllm":
        return {}
    found = vllm.constants(config.model_type, config.blueprint, config.scheme)
    return {name: (PlannedTensor(name, Rule.REPLICATED, 0, shape, ()), value) for name, (value, shape) in found.items()}


def _unproven(engine: Engine, config: ModelConfig, plan: PartitionPlan, left: Collection[str]) -> str | None:
    """What of the model nobody has seen ``engine`` load."""
    blueprint = config.blueprint
    if config.model_type not in engine.families:
        return f"model_type {config.model_type} (it is for {', '.join(engine.families)})"
    if config.cutting.expert_parallel > 1:
        return "experts that are dealt to the ranks"
    if config.model_type in engine.tied and not blueprint.tied:
        return "a head of its own, which the engine's model lacks"
    for number, layer in enumerate(blueprint.layers):
        sparse = any(isinstance(part, Experts) for part in layer.parts)
        if not sparse and config.model_type in engine.all_sparse:
            return f"a layer without experts ({number}), to which the engine gives some"
        for linear, _, _ in _held(layer):
            if linear.bias and linear.name.endswith(engine.no_bias.get(config.model_type, ())):
                return f"a bias of {linear.name} (layer {number}), which the engine's model lacks"
    if config.scheme is None:
        return None
    for number, layer in enumerate(blueprint.layers):
        for linear, of_experts, by_engine in _held(layer):
            if (why := _unknown_format(engine, config.model_type, linear, of_experts, by_engine)) is not None:
                return f"{why} (layer {number}, {linear.name})"
    return _unknown_tensors(engine, config, plan, left)


def _held(layer: Layer) -> Iterator[tuple[Linear, bool, bool]]:
    """The linears of a layer; whether each is one of experts; whether the engine quantises it at all."""
    for part in layer.parts:
        if isinstance(part, Experts):
            yield from ((linear, True, True) for linear in (part.gate_up, part.down))
            yield from ((linear, False, True) for linear in (() if part.shared is None else linears(part.shared)))
            yield from ((linear, False, False) for linear in (() if part.shared_gate is None else (part.shared_gate,)))
        else:
            yield from ((linear, False, True) for linear in linears(part))


def _unknown_format(engine: Engine, model_type: str, linear: Linear, of_experts: bool, by_engine: bool) -> str | None:
    storage = linear.storage
    if storage.is_dense:
        return None
    quantised = f"quantised weights ({storage.format}{' of experts' if of_experts else ''})"
    entries = {entry.name for entry in storage if not entry.optional}
    known = next((one for one in engine.formats if _is(one, storage.format, entries)), None)
    if known is None or (known.experts if of_experts else known.dense) is None or not by_engine:
        return quantised
    if model_type in known.but:
        return f"{quantised} and is {model_type}"
    fused = len({part.source for part in linear.parts}) < len(linear.parts)
    by_tensor = any(entry.out is None and entry.inp is None and not entry.last for entry in storage)
    return f"{quantised}, fused in the checkpoint, with one scale" if fused and by_tensor else None


def _is(known: Format, name: str, entries: Collection[str]) -> bool:
    return re.fullmatch(known.pattern, name) is not None and set(entries) == known.entries


def _unknown_tensors(engine: Engine, config: ModelConfig, plan: PartitionPlan, left: Collection[str]) -> str | None:
    """Tensors of a quantised checkpoint that the engine has and the shards have not, or the other way round."""
    blueprint, scheme = config.blueprint, config.scheme
    assert scheme is not None
    root = blueprint.root(plan.source_shapes)
    for number, layer in enumerate(blueprint.layers):
        prefix = blueprint.prefix.format(number)
        cached = [renamed(prefix + name, root) for name in scheme.unused]
        if (found := next((name for name in cached if name in left), None)) is not None:
            return f"scales of its cache ({found})"
        routers = [one.parts[0].source for part in layer.parts for one in _routers(part)]
        if config.model_type in engine.quantised_routers and any(
            scheme.storage([renamed(prefix + name, root)]) is not None for name in routers
        ):
            return f"a router that its config does not leave unquantised ({prefix}{routers[0]})"
    held = {split.name for split in plan.splits}
    for split in blueprint.splits():
        wanted = split.name.endswith("_scale") and not split.name.endswith("output_scale")
        if split.optional and wanted != (split.name in held):
            return f"{'no ' if wanted else ''}{split.name}, which {'it needs' if wanted else 'it lacks'}"
    return None


def _routers(part: object) -> Iterator[Linear]:
    if isinstance(part, Experts):
        yield from (one for one in part.router if isinstance(one, Linear))


def _fits(config: ModelConfig, tp_size: int) -> bool:
    try:
        return _unfit(config.blueprint, build_plan(config, tp_size)) is None
    except PartitionError:
        return False


def _unfit(blueprint: Blueprint, plan: PartitionPlan) -> str | None:
    """What of a split an engine that divides evenly does not make."""
    first = plan.shards[0]
    for name in first:
        if any(shard[name].shape != first[name].shape for shard in plan.shards):
            return f"the ranks' {name} differ in shape"
    for number in blueprint.alike:
        layer, prefix = blueprint.layers[number], blueprint.prefix.format(number)
        mixer = layer.mixer
        if not isinstance(mixer, Attention) and mixer.recurrent and mixer.num_kv_heads % plan.tp_size:
            return f"key heads of {prefix}{mixer.kind}, {mixer.num_kv_heads} in number, would be on several ranks"
        for part in layer.parts:
            for linear in linears(part):
                if not linear.storage.is_dense and _divides(linear, plan.tp_size):
                    return f"a border in {prefix}{linear.name} would be inside of what has one scale"
    return None


def _divides(linear: Linear, tp_size: int) -> bool:
    """Whether a border between ranks, or between parts below each other, is inside of a unit of the storage."""
    out, inp = linear.storage.out_unit, linear.storage.inp_unit
    for part in linear.parts:
        last = part is linear.parts[-1]
        for held in part.cut.ranges(part.length, tp_size):
            if held.start % out or (held.stop % out and not (last and held.stop == part.length)):
                return True
    return any(
        held.start % inp or (held.stop % inp and held.stop != linear.inputs)
        for held in linear.input_cut.ranges(linear.inputs, tp_size)
    )
