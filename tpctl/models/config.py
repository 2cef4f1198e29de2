"""``config.json`` read strictly into frozen dataclasses, without torch or transformers.

Both layouts of RoPE settings are read: ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters``
(transformers 5). Unknown architectures, activations and RoPE kinds are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from tpctl.errors import CheckpointError, UnsupportedModelError, shown
from tpctl.models.specs import ACTIVATIONS, DTYPES, FAMILIES, ROPE_KINDS, FamilySpec
from tpctl.partition.plan import Geometry

_ROPE_TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Fields that transformers 4 kept beside ``rope_scaling``, or in it."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: ``kind`` is one of ``ROPE_KINDS``; ``params`` holds that kind's own numbers, unchanged."""

    kind: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a checkpoint that tpctl needs to cut and run it.

    ``windows`` has one entry a layer: the sliding window in tokens (the token itself counted), or ``None``.
    """

    model_type: str
    family: FamilySpec
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.num_heads, self.num_kv_heads, self.head_dim, self.vocab_size)

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json`` (and the EOS ids of ``generation_config.json``, where they differ).

        Raises:
            CheckpointError: the file is missing, not JSON, or lacks a field.
            UnsupportedModelError: it names something tpctl does not know.
        """
        raw = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        return cls.from_dict(raw, _read_json(generation) if generation.is_file() else {})

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Parse a config's dictionary; ``generation`` is that of ``generation_config.json``. Errors as ``load``."""
        model_type = raw.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None or not isinstance(model_type, str):
            raise UnsupportedModelError(
                f"model_type {shown(model_type)} is not supported; tpctl knows {', '.join(sorted(FAMILIES))}"
            )
        architectures = raw.get("architectures") or [family.architecture]
        if not isinstance(architectures, list):
            raise CheckpointError(f"config.json: architectures is {shown(architectures)}, but a list is needed")
        if family.architecture not in architectures:
            raise UnsupportedModelError(
                f"architecture {shown(architectures[0])} of model_type {shown(model_type)} is not supported; "
                f"tpctl runs {family.architecture}"
            )
        if quantization := _mapping(raw, "quantization_config"):
            method = quantization.get("quant_method", "unknown")
            raise UnsupportedModelError(
                f"the checkpoint is quantised ({shown(method)}), which is not supported yet; "
                "use its unquantised original"
            )
        activation = raw.get("hidden_act", "silu")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UnsupportedModelError(f"activation {shown(activation)} is not supported; tpctl knows silu")

        num_heads = _positive(raw, "num_attention_heads")
        hidden_size = _positive(raw, "hidden_size")
        num_layers = _positive(raw, "num_hidden_layers")
        head_dim = _positive(raw, "head_dim") if raw.get("head_dim") is not None else hidden_size // num_heads
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise CheckpointError(
                f"config.json has no head_dim, and hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_heads}"
            )
        rope = _rope(raw, family, head_dim)
        return cls(
            model_type=model_type,
            family=family,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_positive(raw, "num_key_value_heads", num_heads),
            head_dim=head_dim,
            intermediate_size=_positive(raw, "intermediate_size"),
            vocab_size=_positive(raw, "vocab_size"),
            rms_norm_eps=_number(raw, "rms_norm_eps", family.rms_norm_eps),
            max_position_embeddings=_longest(rope),
            rope=rope,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=_switch(family.qkv_bias, raw),
            o_bias=_switch(family.o_bias, raw),
            mlp_bias=_switch(family.mlp_bias, raw),
            windows=_windows(raw, family, num_layers),
            dtype=_dtype(raw),
            eos_token_ids=_eos(raw, generation or {}),
            bos_token_id=next(iter(_token_ids(raw, "bos_token_id")), None),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is not a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The field's value; ``default``, if there is one, where it is missing or null."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise CheckpointError(
            f"config.json: {key} is {shown(value)}, but a positive whole number of less than 2^31 is needed"
        )
    return value


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {shown(value)}, but a positive number is needed")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {shown(value)}, but true or false is needed")
    return bool(value)


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of the object that the field holds; empty where it is missing or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key} is {shown(value)}, but an object is needed")
    return dict(value or {})


def _token_ids(raw: Mapping[str, Any], key: str, file: str = "config.json") -> list[int]:
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise CheckpointError(f"{file}: {key} is {shown(value)}, but a token id or a list of them is needed")
    return list(ids)


def _switch(rule: bool | str, raw: Mapping[str, Any]) -> bool:
    return _flag(raw, rule) if isinstance(rule, str) else rule


def _rope(raw: Mapping[str, Any], family: FamilySpec, head_dim: int) -> RopeConfig:
    params = _rope_params(raw)
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    if kind == "su":  # the name of Phi-3's first release
        kind = "longrope"
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"RoPE kind {shown(kind)} is not supported; tpctl knows {', '.join(sorted(ROPE_KINDS))}"
        )
    theta = _number(params, "rope_theta", _number(raw, "rope_theta", 10000.0))
    factor = _number(params, "partial_rotary_factor", _number(raw, "partial_rotary_factor", 1.0))
    if factor != 1.0 and not family.partial_rotary:
        raise UnsupportedModelError(f"partial_rotary_factor {factor} is not supported for {family.architecture}")
    positions = _positive(raw, "max_position_embeddings")
    original = _positive(
        params, "original_max_position_embeddings", _positive(raw, "original_max_position_embeddings", positions)
    )
    for key in _ROPE_TOP_LEVEL:
        params.pop(key, None)
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
    }.get(kind, ())
    missing = [name for name in needed if name not in params]
    if missing:
        raise CheckpointError(f"config.json: RoPE kind {shown(kind)} needs {shown(missing[0])}, which is not there")
    rotary_dim = int(head_dim * factor)
    _check_rope(kind, params, needed, rotary_dim)
    return RopeConfig(kind, theta, rotary_dim, positions, original, params)


def _rope_params(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE settings, from whichever layout the file has.

    A file with both must say one thing: transformers 5 lets the older field win, which whoever edited the newer one
    does not expect.
    """
    new, old = _mapping(raw, "rope_parameters"), _mapping(raw, "rope_scaling")
    if not new or not old:
        return new or old
    for params in (new, old):
        params["rope_type"] = params.pop("rope_type", None) or params.pop("type", None) or "default"
        params.pop("type", None)
    for name in sorted(new.keys() | old.keys()):
        values = [params.get(name, raw.get(name)) for params in (new, old)]
        if values[0] != values[1] and not (name in _ROPE_TOP_LEVEL and None in values):
            raise CheckpointError(
                f"config.json has rope_parameters and rope_scaling, and their {name} differs: {shown(values[0])} and "
                f"{shown(values[1])}; keep the one that is meant"
            )
    return new


def _longest(rope: RopeConfig) -> int:
    """Positions that the model takes. A yarn factor extends them without changing the other fields of a config."""
    if rope.kind != "yarn":
        return rope.max_position_embeddings
    return max(rope.max_position_embeddings, int(rope.original_max_position_embeddings * float(rope.params["factor"])))


def _check_rope(kind: str, params: Mapping[str, Any], needed: tuple[str, ...], rotary_dim: int) -> None:
    """Refuse numbers that would make a wrong table, or none."""
    nested = [name for name, value in params.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(f"RoPE parameters by layer type ({shown(nested[0])}) are not supported")
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(f"config.json: {rotary_dim} rotated dimensions a head do not form pairs")
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor")
    for name in (*needed, *(name for name in optional if params.get(name) is not None)):
        value = params[name]
        if kind != "longrope" or not name.endswith("_factor") or name == "attention_factor":
            _number({name: value}, name, 1.0)
            continue
        pairs = rotary_dim // 2
        if not isinstance(value, list) or len(value) != pairs:
            held = len(value) if isinstance(value, list) else value
            raise CheckpointError(f"config.json: {name} has {held} numbers, but {pairs} are rotated pairs of a head")
        for number in value:
            _number({name: number}, name, 1.0)
    if kind == "llama3" and params["low_freq_factor"] >= params["high_freq_factor"]:
        low, high = params["low_freq_factor"], params["high_freq_factor"]
        raise CheckpointError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")


def _windows(raw: Mapping[str, Any], family: FamilySpec, num_layers: int) -> tuple[int | None, ...]:
    if family.window == "none" or raw.get("sliding_window") is None:
        return (None,) * num_layers
    if family.window == "layers" and not _flag(raw, "use_sliding_window"):
        return (None,) * num_layers
    window = _positive(raw, "sliding_window")
    if family.window == "always":
        return (window,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", num_layers)
        if not isinstance(first, int):
            raise CheckpointError(f"config.json: max_window_layers is {shown(first)}, but a whole number is needed")
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list):
        raise CheckpointError(f"config.json: layer_types is {shown(kinds)}, but a list is needed")
    if unknown := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
        raise UnsupportedModelError(
            f"layer type {shown(unknown[0])} is not supported; tpctl knows full and sliding attention"
        )
    if len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(raw: Mapping[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"dtype {shown(dtype)} is not supported; tpctl knows {', '.join(DTYPES)}")
    return dtype


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = _token_ids(raw, "eos_token_id") + _token_ids(generation, "eos_token_id", "generation_config.json")
    return tuple(dict.fromkeys(ids))
