"""What a config means that lacks a field, or has null in it: what transformers' configuration class makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from tests.unit.config_fields import BASE, MISSING, NO_WINDOW, ORIGINAL, ROPES, config_of, found, understood, usual
from tests.unit.synthetic import RUN
from tpctl.arch.config import ModelConfig
from tpctl.errors import TpctlError

BIASED = ("cohere2", "llama", "qwen3", "seed_oss", "olmo2", "granite", "smollm3", "gpt_oss")
"""Families that may have biases in attention."""
MLP_BIASED = ("llama", "seed_oss", "granite", "smollm3")
MIXED = (
    *("deepseek_v3", "glm4_moe", "kimi_k2", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
)
GEMMA4 = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
APART = (
    "gemma2",
    "gemma3",
    "gemma3_text",
    *GEMMA4,
    "ministral3",
    "mistral3",
    "olmo3",
    "qwen3_5",
    "qwen3_5_moe",
    *MIXED,
)
"""Families that have tests of their own."""


def cases() -> Iterator[tuple[str, str, str, Any]]:
    for family in sorted({*RUN} - {*APART}):
        for rope in ROPES:
            if family == "phi3" and rope in ("linear", "yarn", "llama3"):
                continue
            yield family, rope, "", None
            for key in BASE if rope == "default" else ("rope_theta", "original_max_position_embeddings"):
                if (family in NO_WINDOW and key == "sliding_window") or (family == "gpt_oss" and key == ORIGINAL):
                    continue
                yield family, rope, key, MISSING
                if key != "original_max_position_embeddings" or rope in ("yarn", "llama3", "longrope"):
                    yield family, rope, key, None


def wanted(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers understands; raises what it raises."""
    config = understood(family, raw)
    kinds = (
        config.layer_types
        if family.startswith(("qwen", "smollm3", "gpt_oss", "cohere2"))
        else ["sliding_attention"] * config.num_hidden_layers
    )
    window = None if family in NO_WINDOW else config.sliding_window
    attention_bias = family in BIASED and config.attention_bias
    return {
        **usual(config),
        "intermediate_size": config.intermediate_size,
        "qkv_bias": family == "qwen2" or attention_bias or (family == "glm4" and config.attention_bias),
        "o_bias": config.attention_out_bias if family == "seed_oss" else attention_bias,
        "mlp_bias": family == "gpt_oss" or (family in MLP_BIASED and config.mlp_bias),
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
    }


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_a_field_that_is_missing_or_null(case: tuple[str, str, str, Any]) -> None:
    family, rope, key, value = case
    raw = config_of(family, rope, key, value)
    try:
        expected = wanted(family, config_of(family, rope, key, value))
    except Exception:  # of many kinds, from the depths of its checks
        with pytest.raises(TpctlError, match=key):
            ModelConfig.from_dict(raw)
        return
    assert found(raw, "intermediate_size", "mlp_bias") == expected


OWN: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1, 0] * 11, "no_rope_layer_interval": 5},
    "cohere2": {"logit_scale": 0.4, "sliding_window_pattern": 5},
    "granite": dict.fromkeys(
        ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 0.75
    ),
}
"""Fields that only these families have."""


@pytest.mark.parametrize("value", [MISSING, None, 0, [1] * 30])
@pytest.mark.parametrize(("family", "key"), [(family, key) for family, fields in OWN.items() for key in ("", *fields)])
def test_a_field_of_its_own_that_is_missing_or_null(family: str, key: str, value: Any) -> None:
    raw = {**config_of(family, "default", "", None), **OWN[family], **({key: value} if key else {})}
    raw = {name: given for name, given in raw.items() if given is not MISSING}
    try:
        expected = own_of(family, raw)
    except Exception:  # of many kinds
        with pytest.raises(TpctlError, match=key):
            ModelConfig.from_dict(raw)
        return
    blueprint = ModelConfig.from_dict(raw).blueprint
    blocks = blueprint.blocks
    assert expected == {
        "rotated": [block.attention.rope is not None for block in blocks],
        "factors": (blueprint.embedding_scale, blocks[0].attention.scale, blocks[0].residual_scale),
        "logits": pytest.approx(blueprint.logit_scale),
    }


def own_of(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of them; raises what it raises, and where no model could compute with the result."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**{key: value for key, value in raw.items() if key != "model_type"})
    if family == "granite":
        factors = (config.embedding_multiplier, config.attention_multiplier, config.residual_multiplier)
        if not all(factors):
            raise ValueError("nothing would be left")
        return {"rotated": [True] * 30, "factors": factors, "logits": 1 / config.logits_scaling}
    if family == "cohere2":
        rotated = [kind == "sliding_attention" for kind in config.layer_types]
        return {"rotated": rotated, "factors": (1.0, 24**-0.5, 1.0), "logits": config.logit_scale}
    rotated = [bool(config.no_rope_layers[layer]) for layer in range(30)]
    return {"rotated": rotated, "factors": (1.0, 24**-0.5, 1.0), "logits": 1.0}


OLMO3: dict[str, Any] = {
    **{
        key: value for key, value in BASE.items() if not key.startswith(("mlp_", "use_", "max_window", "attention_out"))
    },
    "num_hidden_layers": 7,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 1.2,
        "original_max_position_embeddings": 64,
    },
}
del OLMO3["original_max_position_embeddings"], OLMO3["partial_rotary_factor"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 4},
        {
            "rope_scaling": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
            },
        },
    ],
)
@pytest.mark.parametrize(("key", "value"), [("", None), *((key, one) for key in OLMO3 for one in (MISSING, None))])
def test_a_field_of_olmo_3_that_is_missing_or_null(key: str, value: Any, changes: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    raw = {**OLMO3, **({} if key == "num_hidden_layers" else changes), **({key: value} if key else {})}
    raw = {name: given for name, given in raw.items() if given is not MISSING}
    try:
        config = CONFIG_MAPPING["olmo3"](**deepcopy(raw))
        ropes = config.rope_parameters
        if config.sliding_window is None or None in (rope["rope_theta"] for rope in ropes.values()):
            raise ValueError("no mask or table can be made of this")
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        if head_dim is None:
            raise ValueError("of what size the heads are, nothing says")
    except Exception:  # of many kinds, from the depths of its checks
        with pytest.raises(TpctlError, match=key):
            ModelConfig.from_dict({**raw, "model_type": "olmo3"})
        return
    read = ModelConfig.from_dict({**raw, "model_type": "olmo3"})
    blocks = read.blueprint.blocks
    assert [
        (
            one.attention.window,
            one.attention.rope.kind,
            one.attention.rope.theta,
            one.attention.rope.params.get("factor"),
        )
        for one in blocks
    ] == [
        (
            config.sliding_window if kind == "sliding_attention" else None,
            *(ropes[kind].get(name) for name in ("rope_type", "rope_theta", "factor")),
        )
        for kind in config.layer_types
    ]
    attention, ends = blocks[0].attention, config.eos_token_id
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.qkv.bias) == (
        *(config.num_attention_heads, config.num_key_value_heads, head_dim, config.attention_bias),
    )
    assert (read.blueprint.norm.eps, read.blueprint.tied, read.vocab_size, read.blueprint.hidden_size) == (
        *(config.rms_norm_eps, config.tie_word_embeddings, config.vocab_size, config.hidden_size),
    )
    assert blocks[0].mlp.down.inputs == config.intermediate_size
    assert list(read.eos_token_ids) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
