"""What config.json says and leaves out, for tests of what is understood then."""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import cache
from typing import Any

from tests.described import described
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES

BASE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 40,
    "vocab_size": 260000,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "use_sliding_window": True,
    "sliding_window": 128,
    "max_window_layers": 1,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "rope_scaling": None,
    "rope_parameters": None,
    "layer_types": None,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 64,
}

FACTORS = [1.0 + place / 4 for place in range(12)]

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "llama3": {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "longrope": {"rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "no theta": {"rope_parameters": {"rope_type": "default"}},
}

MISSING, ORIGINAL = "missing", "original_max_position_embeddings"

NO_WINDOW = ("llama", "seed_oss", "olmo2", "granite", "minimax_m2", "glm4")
"""Families that refuse one."""


@cache
def own_field(family: str, key: str) -> bool:
    """Whether the family's class in transformers has such a field."""
    from transformers import CONFIG_MAPPING

    return family not in CONFIG_MAPPING or hasattr(CONFIG_MAPPING[family](), key)


def config_of(family: str, rope: str, key: str, value: Any) -> dict[str, Any]:
    raw = {**BASE, **deepcopy(ROPES[rope]), "model_type": family, "architectures": [FAMILIES[family].architecture]}
    if family in NO_WINDOW:
        del raw["sliding_window"]  # refused
    for other in ("attention_bias", "attention_out_bias", "mlp_bias", "use_sliding_window"):
        if not own_field(family, other):
            del raw[other]  # refused
    if family == "gpt_oss":
        del raw[ORIGINAL]  # its default RoPE says another
    if family == "cohere2":
        raw["layer_norm_eps"] = raw["rms_norm_eps"]
    if key:
        raw[key] = value
    return {name: value for name, value in raw.items() if value is not MISSING}


def understood(family: str, raw: dict[str, Any]) -> Any:
    """The configuration that transformers makes of it; raises what it raises."""
    from transformers import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[family](**{key: value for key, value in raw.items() if key != "model_type"})
        config.standardize_rope_params()  # as its rotary tables do
    if family in ("granite", "olmo2", "smollm3") and getattr(config, "head_dim", 0) is None:
        raise ValueError("the class knows no such field, and its attention takes it as it is")
    if family in ("cohere2", "gpt_oss") and config.sliding_window is None:
        raise ValueError("no mask can be made of this")
    rope = config.rope_parameters
    if rope["rope_theta"] is None or rope.get("original_max_position_embeddings", 1) is None:
        raise ValueError("no table can be made of this")
    return config


def usual(config: Any) -> dict[str, Any]:
    """What all families have."""
    rope, ends = config.rope_parameters, config.eos_token_id
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.layer_norm_eps if config.model_type == "cohere2" else config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_ids": tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
        "bos_token_id": config.bos_token_id,
        "positions": config.max_position_embeddings,
        "rope": (rope["rope_type"], rope["rope_theta"], rope.get("factor")),
        "original": rope.get("original_max_position_embeddings", config.max_position_embeddings),
    }


def found(raw: dict[str, Any], *more: str) -> dict[str, Any]:
    """The same here, with ``more`` of what is described."""
    config = described(ModelConfig.from_dict(raw))
    rope = config.rope
    names = (
        *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "rms_norm_eps"),
        *("tie_word_embeddings", "qkv_bias", "o_bias", "windows", "eos_token_ids", "bos_token_id", *more),
    )
    return {
        **{name: getattr(config, name) for name in names},
        "positions": rope.max_position_embeddings,
        "rope": (rope.kind, rope.theta, rope.params.get("factor")),
        "original": rope.original_max_position_embeddings,
    }
