"""NVIDIA's ModelOpt, as it exports NVFP4 and FP8 by tensor (``quant_method: modelopt``).

    NVFP4   weight U8 [N, K/2], low nibble first; weight_scale e4m3 [N, K/16]; weight_scale_2, one: a weight is
            code * weight_scale * weight_scale_2
    FP8     weight e4m3 [N, K]; weight_scale, one

``input_scale``, one where activations are rounded too, is for an engine that does so with a scale known beforehand.
What stays in floats ``ignore`` names, in older files ``exclude_modules``: modules, or patterns of a shell
(``model.layers.0.self_attn*``). Older files have all of it inside of ``quantization``, as ``hf_quant_config.json`` has
(vLLM 0.33, ``quantization/modelopt.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from tpctl.arch.fields import Fields
from tpctl.arch.formats.fp8 import E4M3, KEPT, tensor_storage
from tpctl.arch.storage import Axis, Coding, Entry, Storage
from tpctl.errors import UnsupportedModelError, shown

GROUP = 16
"""Inputs that share a scale."""

_INPUT = Entry(".input_scale", "input_scale", ("F32", "BF16", "F16"), optional=True, role="inputs")
_NVFP4 = Storage(
    "ModelOpt's NVFP4",
    (
        Entry(".weight", "weight", ("U8",), Axis(0), Axis(1, 2, packed=True)),
        Entry(".weight_scale", "weight_scale", E4M3, Axis(0), Axis(1, GROUP), role="scales"),
        Entry(".weight_scale_2", "weight_scale_2", ("F32",), role="factor"),
        _INPUT,
    ),
    coding=Coding("e2m1", 4),
)
_FP8 = tensor_storage("weight_scale")
ALGORITHMS = {
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
    "FP8": replace(_FP8, format="ModelOpt's FP8", entries=(*_FP8.entries, _INPUT)),
}
"""By ``quant_algo``."""
_OTHERWISE = "use the model in one of these, as compressed-tensors or fp8, or its unquantised original"


@dataclass(frozen=True)
class ModelOpt:
    """All linears but those that ``ignored`` names or matches are ``stored`` so."""

    stored: Storage
    ignored: tuple[str, ...]
    unused: tuple[str, ...] = KEPT

    def storage(self, names: Sequence[str]) -> Storage | None:
        return None if any(self._ignores(name) for name in names) else self.stored

    def _ignores(self, module: str) -> bool:
        """Also what is inside of a module that is named, and what a list names by the end of its name."""
        inside = f".{module}."
        return any(f".{one}." in inside or fnmatchcase(module, one) for one in self.ignored)


def read(fields: Fields) -> ModelOpt:
    key = "ignore"
    if inner := fields.mapping("quantization"):
        fields, key = fields.within(inner), "exclude_modules"
    algorithm = fields.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm.upper() not in ALGORITHMS:
        raise UnsupportedModelError(
            f"{fields.file}: quant_algo of ModelOpt's weights is {shown(algorithm)}, tpctl knows "
            f"{', '.join(ALGORITHMS)}; {_OTHERWISE}"
        )
    if fields.mapping("quantized_layers"):
        raise UnsupportedModelError(
            f"{fields.file}: quantized_layers gives layers of ModelOpt's weights a format each, tpctl knows one for "
            f"all, {', '.join(ALGORITHMS)}; {_OTHERWISE}"
        )
    stored = ALGORITHMS[algorithm.upper()]
    sizes = [fields.get("group_size")]
    for group in fields.mapping("config_groups").values():
        weights = group.get("weights") if isinstance(group, dict) else None
        sizes.append(weights.get("group_size") if isinstance(weights, dict) else None)
    for size in sizes:
        if stored is _NVFP4 and size not in (None, GROUP):
            raise UnsupportedModelError(
                f"{fields.file}: ModelOpt's NVFP4 weights are in groups of {shown(size)}, tpctl knows groups of {GROUP}"
            )
    return ModelOpt(stored, tuple(fields.names(key)))


def read_beside(fields: Fields) -> ModelOpt:
    """What ``hf_quant_config.json`` says. Raises ``UnsupportedModelError`` as ``read``, and if another program wrote
    it."""
    name = fields.inside("producer").get("name")
    if name not in (None, "modelopt"):
        raise UnsupportedModelError(
            f"{fields.file}: it is by {shown(name)}, and tpctl knows what ModelOpt writes there; use the model as "
            "compressed-tensors or fp8, or its unquantised original"
        )
    return read(fields)
