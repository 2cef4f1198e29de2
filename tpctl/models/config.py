"""``config.json`` read strictly into frozen dataclasses, without torch or transformers.

Both layouts of RoPE settings are read: ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters``
(transformers 5). Unknown architectures, activations and RoPE kinds are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpctl.errors import CheckpointError, UnsupportedModelError
from tpctl.models.specs import ACTIVATIONS, DTYPES, FAMILIES, ROPE_KINDS, FamilySpec
from tpctl.partition.plan import Geometry


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
                f"model_type {model_type!r} is not supported; tpctl knows {', '.join(sorted(FAMILIES))}"
            )
        architectures = raw.get("architectures") or [family.architecture]
        if family.architecture not in architectures:
            raise UnsupportedModelError(
                f"architecture {architectures[0]!r} of model_type {model_type!r} is not supported; "
                f"tpctl runs {family.architecture}"
            )
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModelError(
                f"the checkpoint is quantised ({method!r}), which is not supported yet; use its unquantised original"
            )
        activation = raw.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(f"activation {activation!r} is not supported; tpctl knows silu")

        num_heads = _positive(raw, "num_attention_heads")
        hidden_size = _positive(raw, "hidden_size")
        num_layers = _positive(raw, "num_hidden_layers")
        head_dim = raw.get("head_dim") or hidden_size // num_heads
        if not raw.get("head_dim") and hidden_size % num_heads:
            raise CheckpointError(
                f"config.json has no head_dim, and hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_heads}"
            )
        return cls(
            model_type=model_type,
            family=family,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            intermediate_size=_positive(raw, "intermediate_size"),
            vocab_size=_positive(raw, "vocab_size"),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=_positive(raw, "max_position_embeddings"),
            rope=_rope(raw, family, head_dim),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=_switch(family.qkv_bias, raw),
            o_bias=_switch(family.o_bias, raw),
            mlp_bias=_switch(family.mlp_bias, raw),
            windows=_windows(raw, family, num_layers),
            dtype=_dtype(raw),
            eos_token_ids=_eos(raw, generation or {}),
            bos_token_id=raw.get("bos_token_id"),
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


def _positive(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, but a positive whole number is needed")
    return value


def _switch(rule: bool | str, raw: Mapping[str, Any]) -> bool:
    return bool(raw.get(rule, False)) if isinstance(rule, str) else rule


def _rope(raw: Mapping[str, Any], family: FamilySpec, head_dim: int) -> RopeConfig:
    params = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    kind = {"su": "longrope"}.get(kind, kind)  # the name of Phi-3's first release
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"RoPE kind {kind!r} is not supported; tpctl knows {', '.join(sorted(ROPE_KINDS))}")
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    factor = params.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not family.partial_rotary:
        raise UnsupportedModelError(f"partial_rotary_factor {factor} is not supported for {family.architecture}")
    positions = _positive(raw, "max_position_embeddings")
    original = (
        params.pop("original_max_position_embeddings", None) or raw.get("original_max_position_embeddings") or positions
    )
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
    }.get(kind, ())
    missing = [name for name in needed if name not in params]
    if missing:
        raise CheckpointError(f"config.json: RoPE kind {kind!r} needs {missing[0]!r}, which is not there")
    return RopeConfig(kind, float(theta), int(head_dim * factor), positions, int(original), params)


def _windows(raw: Mapping[str, Any], family: FamilySpec, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if family.window == "none" or window is None:
        return (None,) * num_layers
    if family.window == "always":
        return (int(window),) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", num_layers)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"layer type {unknown[0]!r} is not supported; tpctl knows full and sliding attention"
        )
    if len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _dtype(raw: Mapping[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"dtype {dtype!r} is not supported; tpctl knows {', '.join(DTYPES)}")
    return dtype


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        found.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(dict.fromkeys(found))
