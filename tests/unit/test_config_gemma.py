"""What a config of Gemma 2 or 3 means that lacks a field, or has null in it: what transformers' class makes of it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.unit.config_fields import MISSING
from tpctl.arch.config import ModelConfig
from tpctl.errors import TpctlError

GEMMA: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 40,
    "vocab_size": 40000,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 700.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": True,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "sliding_window_pattern": 3,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
}


def read_by_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["gemma3_text"](**deepcopy(raw))
    ends, ropes = config.eos_token_id, config.rope_parameters
    if config.sliding_window is None or None in (rope["rope_theta"] for rope in ropes.values()):
        raise ValueError("no mask or table can be made of this")
    return {
        "heads": (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        "sizes": (config.hidden_size, config.intermediate_size, config.vocab_size, config.rms_norm_eps),
        "switches": (config.tie_word_embeddings, config.attention_bias, config.final_logit_softcapping),
        "scale": config.query_pre_attn_scalar**-0.5,
        "ends": (config.bos_token_id, ends if isinstance(ends, list) else [] if ends is None else [ends]),
        "layers": [
            (
                config.sliding_window if kind == "sliding_attention" else None,
                *(ropes[kind].get(name) for name in ("rope_type", "rope_theta", "factor")),
            )
            for kind in config.layer_types
        ],
    }


def read_here(raw: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig.from_dict({**raw, "model_type": "gemma3_text"})
    blueprint, attention = config.blueprint, config.blueprint.blocks[0].attention
    block = blueprint.blocks[0]
    return {
        "heads": (attention.num_heads, attention.num_kv_heads, attention.head_dim),
        "sizes": (blueprint.hidden_size, block.mlp.down.inputs, config.vocab_size, block.before_mlp.eps),
        "switches": (blueprint.tied, attention.qkv.bias, blueprint.logit_softcap),
        "scale": attention.scale,
        "ends": (config.bos_token_id, list(config.eos_token_ids)),
        "layers": [
            (one.window, one.rope.kind, one.rope.theta, one.rope.params.get("factor"))
            for one in (block.attention for block in blueprint.blocks)
        ],
    }


NESTED = {
    "full_attention": {"rope_type": "default"},
    "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
}


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None, "rope_parameters": NESTED}, {"sliding_window": 512}])
@pytest.mark.parametrize(("key", "value"), [("", None), *((key, value) for key in GEMMA for value in (MISSING, None))])
def test_a_field_of_gemma_3_that_is_missing_or_null(key: str, value: Any, changes: dict[str, Any]) -> None:
    raw = {**GEMMA, **changes, **({key: value} if key else {})}
    raw = {name: given for name, given in raw.items() if given is not MISSING}
    try:
        expected = read_by_transformers(raw)
    except Exception:  # of many kinds, from the depths of its checks
        with pytest.raises(TpctlError, match={"rope_local_base_freq": "rope_theta"}.get(key, key)):
            read_here(raw)
        return
    assert read_here(raw) == expected


GEMMA2: dict[str, Any] = {
    **{key: value for key, value in GEMMA.items() if not key.startswith(("rope_", "sliding_window_pattern"))},
    "rope_theta": 5000.0,
    "attn_logit_softcapping": 20.0,
}


@pytest.mark.parametrize("changes", [{}, {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 4}])
@pytest.mark.parametrize(("key", "value"), [("", None), *((key, one) for key in GEMMA2 for one in (MISSING, None))])
def test_a_field_of_gemma_2_that_is_missing_or_null(key: str, value: Any, changes: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    raw = {**GEMMA2, **({} if key == "num_hidden_layers" else changes), **({key: value} if key else {})}
    raw = {name: given for name, given in raw.items() if given is not MISSING}
    try:
        config = CONFIG_MAPPING["gemma2"](**deepcopy(raw))
        if config.sliding_window is None or config.rope_parameters["rope_theta"] is None:
            raise ValueError("no mask or table can be made of this")
    except Exception:  # of many kinds, from the depths of its checks
        with pytest.raises(TpctlError, match=key):
            ModelConfig.from_dict({**raw, "model_type": "gemma2"})
        return
    read = ModelConfig.from_dict({**raw, "model_type": "gemma2"})
    made_of, ends = read.blueprint, config.eos_token_id
    attention = made_of.blocks[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.scale, attention.softcap) == (
        *(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        *(config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping),
    )
    assert (attention.rope.theta, attention.qkv.bias, attention.out.bias) == (
        config.rope_parameters["rope_theta"],
        *(config.attention_bias, config.attention_bias),
    )
    assert (made_of.hidden_size, made_of.tied, made_of.logit_softcap, made_of.norm.eps, made_of.vocab_size) == (
        *(config.hidden_size, config.tie_word_embeddings, config.final_logit_softcapping),
        *(config.rms_norm_eps, config.vocab_size),
    )
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    assert made_of.windows == tuple(config.sliding_window if one else None for one in sliding)
    assert made_of.blocks[0].mlp.down.inputs == config.intermediate_size
    assert list(read.eos_token_ids) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
    assert (read.bos_token_id, read.max_position_embeddings) == (config.bos_token_id, config.max_position_embeddings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true, which is not supported"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0, which is not supported"),
        ({"final_logit_softcapping": 0}, r"final_logit_softcapping is 0, but a number from 0\.001"),
        ({"hidden_activation": "silu"}, 'activation "silu" is not supported'),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, 'rope_parameters has "rope_type"'),
        ({"sliding_window": None}, "layers have sliding attention, but no sliding_window is in use"),
        ({"layer_types": ["chunked_attention"] * 7}, 'layer type "chunked_attention" is not supported'),
    ],
)
def test_what_gemma_3_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TpctlError, match=said):
        read_here({**GEMMA, **changes})
