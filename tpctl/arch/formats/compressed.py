"""compressed-tensors, as llm-compressor writes it: ``config_groups``, each of which says how the linears that its
``targets`` match are stored, and ``ignore``, which leaves some as they are.

A target is a module's name, a pattern of names (``re:``) or a class, ``Linear``
(compressed-tensors 0.20, ``utils/match.py``, ``quantization/lifecycle/apply.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpctl.arch.fields import Fields
from tpctl.arch.formats.compressed_storage import FORMATS, STRATEGIES, Activations, Weights, storage
from tpctl.arch.formats.fp8 import KEPT
from tpctl.arch.storage import Storage
from tpctl.errors import CheckpointError, UnsupportedModelError, shown

CLASSES = ("Linear", "Module")
"""What a linear is an instance of."""

_CACHE = (*KEPT, *(f"self_attn.{name}_proj.output_scale" for name in "kv"))
_INPUTS = ("tensor", "token", "group", "tensor_group")
"""What inputs have a scale for."""
_REORDERED = {None: False, False: False, "weight": False, "static": False, True: True, "group": True, "dynamic": True}


@dataclass(frozen=True)
class Target:
    """What linears are meant, by a name or a pattern."""

    text: str

    @property
    def is_pattern(self) -> bool:
        return self.text.startswith("re:")

    def names(self, module: str) -> bool:
        if self.is_pattern:
            return re.match(self.text.removeprefix("re:"), module) is not None
        return self.text == module


@dataclass(frozen=True)
class Compressed:
    """Linears that one of ``targets`` matches, and none of ``ignored``, are stored as the first one says: names before
    patterns before classes."""

    targets: tuple[tuple[Target, Storage | None], ...]
    ignored: tuple[Target, ...]
    unused: tuple[str, ...] = ()

    def storage(self, names: Sequence[str]) -> Storage | None:
        plain, patterns = self._ignored
        if not plain.isdisjoint((*CLASSES, *names)) or any(any(map(one.names, names)) for one in patterns):
            return None
        for target, stored in self.targets:
            if any(map(target.names, names)):
                return stored
        return next((stored for target, stored in self.targets if target.text in CLASSES), None)

    @cached_property
    def _ignored(self) -> tuple[frozenset[str], tuple[Target, ...]]:
        """Names and classes, of which there may be hundreds, and patterns."""
        patterns = tuple(one for one in self.ignored if one.is_pattern)
        return frozenset(one.text for one in self.ignored if not one.is_pattern), patterns


def read(fields: Fields) -> Compressed:
    if inner := fields.mapping("quantization_config"):
        fields = fields.within({"sparsity_config": fields.get("sparsity_config"), **inner})
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        _check_absent(fields, key)
    groups = fields.mapping("config_groups")
    cached = fields.mapping("kv_cache_scheme")
    if not groups and not cached:
        raise CheckpointError("config.json: the compressed weights have no config_groups, which say what they are")
    by_target: dict[str, Storage | None] = {}
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise UnsupportedModelError(
                f"config.json: config_groups has {shown(group)} for {shown(name)}, tpctl knows objects that say what "
                "is meant"
            )
        inside = fields.within(group)
        by_target |= dict.fromkeys(inside.names("targets"), _storage(shown(name), inside, fields.get("format")))
    ordered = sorted(by_target.items(), key=lambda one: ("re:" in one[0], one[0]))
    return Compressed(
        tuple((_target(text), stored) for text, stored in ordered),
        tuple(map(_target, fields.names("ignore"))),
        _CACHE if cached else (),
    )


def _check_absent(fields: Fields, key: str) -> None:
    """Refuse sparse weights, ones that are turned, and layers that have fewer experts than others."""
    value = fields.mapping(key)
    if value.get("format", "dense") != "dense" or value.get("config_groups") or value.get("method"):
        what = value.get("method") or value.get("format", "transforms")
        raise UnsupportedModelError(
            f"config.json: the weights are compressed with {key} {shown(what)}, which tpctl does not know; use a "
            "checkpoint without"
        )


def _target(text: str) -> Target:
    target = Target(text)
    if target.is_pattern:
        try:
            re.compile(text.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(f"config.json: {shown(text)} is no pattern: {error}") from None
    return target


def _storage(name: str, group: Fields, common: Any) -> Storage | None:
    """How a group's linears are stored. Errors name the group."""
    if not group.mapping("weights"):
        return None
    given = group.get("format")
    kind = common if given is None else given
    if kind not in FORMATS:
        raise UnsupportedModelError(
            f"config.json: {name} is in the format {shown(kind)} of compressed-tensors, tpctl knows "
            f"{', '.join(FORMATS)}; use one of these or its unquantised original"
        )
    weights, inputs = _weights(name, group.inside("weights")), group.inside("input_activations")
    return storage(
        name,
        kind,
        weights,
        _activations(name, inputs),
        _activations(name, group.inside("output_activations")),
        rounds=bool(inputs.values) and _rounded_so(name, weights, inputs),
    )


def _weights(name: str, fields: Fields) -> Weights:
    bits, kind = _value(fields, "num_bits", 8), str(_value(fields, "type", "int")).lower()
    reordered = fields.get("actorder")
    if kind not in ("int", "float") or type(bits) is not int:
        raise UnsupportedModelError(
            f"config.json: weights of {name} are {shown(bits)} bits of {shown(kind)}, tpctl knows int and float"
        )
    if isinstance(reordered, str):
        reordered = reordered.lower()
    if not isinstance(reordered, str | bool | None) or reordered not in _REORDERED:
        raise UnsupportedModelError(
            f"config.json: actorder of {name} is {shown(reordered)}, tpctl knows group and weight"
        )
    strategy = _scaled(fields)
    if strategy not in STRATEGIES:
        raise UnsupportedModelError(
            f"config.json: weights of {name} are scaled by {shown(strategy)}, tpctl knows {', '.join(STRATEGIES)}"
        )
    return Weights(
        bits,
        kind == "float",
        strategy,
        fields.whole("group_size") if "group" in strategy else 1,
        _block(name, fields.get("block_structure")) if strategy == "block" else (1, 1),
        _value(fields, "symmetric", True) is True,
        _REORDERED[reordered],
    )


def _block(name: str, given: Any) -> tuple[int, int]:
    """Also as old files have it: "128x128"."""
    value = [int(n) if n.isdecimal() else n for n in given.split("x")] if isinstance(given, str) else given
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n <= 2**20 for n in value):
        raise CheckpointError(
            f"config.json: block_structure of {name} is {shown(given)}, but rows and columns, such as [128, 128], are "
            "needed"
        )
    return value[0], value[1]


def _rounded_so(name: str, weights: Weights, inputs: Fields) -> bool:
    """Whether inputs may be rounded as tpctl does it: without zero points to numbers of 8 bits of the weights' kind,
    with a scale for each token, or for each token and each block of inputs that has one in the weights. Others, which
    that would round coarser than the format does, or otherwise, are multiplied as they are."""
    bits, kind, strategy = _value(inputs, "num_bits", 8), str(_value(inputs, "type", "int")).lower(), _scaled(inputs)
    if kind not in ("int", "float") or type(bits) is not int or strategy not in _INPUTS:
        raise UnsupportedModelError(
            f"config.json: inputs of {name} are {shown(bits)} bits of {shown(kind)}, scaled by {shown(strategy)}; "
            f"tpctl knows int and float, by {', '.join(_INPUTS)}"
        )
    alike = bits == 8 and (kind == "float") == weights.is_float and _value(inputs, "symmetric", True) is True
    block = {"block": weights.block[1], "group": weights.group}.get(weights.strategy)
    within = "group" not in strategy or (block is not None and inputs.whole("group_size") % block == 0)
    return alike and within


def _scaled(fields: Fields) -> str:
    """The ``strategy`` of a group's weights or inputs, which may follow from ``group_size``."""
    strategy, size = fields.get("strategy"), fields.get("group_size")
    if strategy is None:
        return "tensor" if size is None else "channel" if size == -1 else "group"
    return strategy.lower() if isinstance(strategy, str) else strategy


def _activations(name: str, fields: Fields) -> Activations | None:
    """Of those that have factors in the checkpoint, as they are not found anew for each input."""
    dynamic, strategy = fields.get("dynamic"), fields.get("strategy") or "tensor"
    if dynamic not in (None, True, False, "local"):
        raise UnsupportedModelError(
            f'config.json: dynamic of {name} is {shown(dynamic)}, tpctl knows true, false and "local"'
        )
    if not fields.values or dynamic is True:
        return None
    if strategy not in ("tensor", "tensor_group"):
        raise UnsupportedModelError(
            f"config.json: activations of {name} have static scales by {shown(strategy)}, tpctl knows tensor"
        )
    return Activations(strategy == "tensor_group", dynamic == "local")


def _value(fields: Fields, key: str, default: Any) -> Any:
    value = fields.get(key)
    return default if value is None else value
