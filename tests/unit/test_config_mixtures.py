"""The same of mixtures of experts: what a field means that is missing or null, as transformers has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch

from tests.described import mlps_by_transformers
from tests.unit.config_fields import BASE, MISSING, ROPES, config_of, found, understood, usual
from tpctl.arch.config import ModelConfig
from tpctl.arch.latent import LatentAttention
from tpctl.errors import TpctlError

OF_QWEN: dict[str, Any] = {
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3, 5],
}
GROUPS: dict[str, Any] = {
    "n_routed_experts": 24,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 2,
}
LINEAR: dict[str, Any] = {"partial_rotary_factor": 0.5, "full_attention_interval": 3}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {**OF_QWEN, "shared_expert_intermediate_size": 28, "qkv_bias": False},
    "qwen3_moe": OF_QWEN,
    "glm4_moe": {
        **GROUPS,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.25,
    },
    "qwen3_next": {**OF_QWEN, **LINEAR, "shared_expert_intermediate_size": 28},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {
        **LINEAR,
        **{key: OF_QWEN[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")},
        "shared_expert_intermediate_size": 28,
    },
    "deepseek_v3": {
        **GROUPS,
        "q_lora_rank": 14,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 24,
        "v_head_dim": 5,
        "rope_interleave": False,
    },
}
"""What each has beside ``BASE``, all of it unlike the default."""
RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Families in which layers without attention are between those with it."""
PARTIAL = ("glm4_moe", *RECURRENT)
"""Those that rotate part of a head."""
NO_WINDOW = ("deepseek_v3", *PARTIAL)


def raw_of(family: str, rope: str = "default", key: str = "", value: Any = None, **changes: Any) -> dict[str, Any]:
    raw = {**config_of(family, rope, "", None), **OWN[family], **changes, **({key: value} if key else {})}
    if family in NO_WINDOW and key != "sliding_window":
        del raw["sliding_window"]  # refused
    return {name: given for name, given in raw.items() if given is not MISSING}


def cases() -> Iterator[tuple[str, str, str, Any]]:
    for family in OWN:
        for rope in ROPES:
            if family in PARTIAL and rope == "longrope":
                continue  # whose factors are for whole heads
            yield family, rope, "", None
        for key in {**BASE, **OWN[family]}:  # of deepseek_v3 the head_dim that transformers reads is ``BASE``'s
            if (family, key) not in (("glm4_moe", "n_group"), ("deepseek_v3", "qk_rope_head_dim")) and not (
                family in NO_WINDOW and key == "sliding_window"
            ):
                yield family, "default", key, MISSING
            if key != "original_max_position_embeddings" and (key != "partial_rotary_factor" or family in RECURRENT):
                yield family, "default", key, None


def wanted(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers understands; raises what it raises, here or as it builds a model."""
    config = understood(family, raw)
    if config.hidden_act is None or (raw.get("head_dim", 1) is None and family != "mixtral"):
        raise ValueError("no model can be built of this")
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads  # which it leaves to the cache to fail at
    if family == "deepseek_v3":
        config.num_key_value_heads = config.num_attention_heads  # whatever it is: no head is copied
        if None in (config.n_group, config.topk_group, config.num_experts_per_tok):
            raise ValueError("no answer can be computed of this")
        if None in (config.norm_topk_prob, config.rope_interleave):
            raise ValueError("it counts for false, where the default is true")
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if family in RECURRENT:
        layers = config.layer_types.count("full_attention")
    kinds = config.layer_types if family == "qwen2_moe" else ["sliding_attention"] * layers
    bias = {"mixtral": False, "qwen2_moe": getattr(config, "qkv_bias", None)}.get(family, config_bias(config))
    rotated = config.rope_parameters.get("partial_rotary_factor", 1.0) if family in PARTIAL else 1.0
    common = usual(config)
    return {
        **common,
        "qkv_bias": bias,
        "o_bias": bias and family in ("qwen3_moe", "deepseek_v3", *RECURRENT),
        "qk_norm": family in ("qwen3_moe", *RECURRENT) or (family == "glm4_moe" and config.use_qk_norm),
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
        "mlps": mlps_by_transformers(config),
        "rotated": int(common["head_dim"] * rotated),
        **(latent_by_transformers(config) if family == "deepseek_v3" else {}),
    }


def latent_by_transformers(config: Any) -> dict[str, Any]:
    """What latent attention is made of; the scale is its modelling code's."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    sizes = (config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim)
    with torch.device("meta"):
        scale = DeepseekV3Attention(config, 0).scaling
    return {"latent": (*sizes, config.v_head_dim), "scale": scale, "interleaved": bool(config.rope_interleave)}


def config_bias(config: Any) -> bool:
    return getattr(config, "attention_bias", False)


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """The same as tpctl reads it."""
    attention: Any = ModelConfig.from_dict(raw).blueprint.attentions[0]
    values = {**found(raw, "qk_norm", "mlps"), "rotated": attention.rope.rotary_dim}
    if isinstance(attention, LatentAttention):
        latent = astuple(attention.sizes)
        values |= {"latent": latent, "scale": attention.scale, "interleaved": attention.rope.interleaved}
    return values


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_a_field_of_a_mixture_that_is_missing_or_null(case: tuple[str, str, str, Any]) -> None:
    family, rope, key, value = case
    raw = raw_of(family, rope, key, value)
    try:
        expected = wanted(family, raw_of(family, rope, key, value))
    except Exception:  # of many kinds, from the depths of its checks
        with pytest.raises(TpctlError, match=key):
            ModelConfig.from_dict(raw)
        return
    assert read(raw) == expected


@pytest.mark.parametrize("family", OWN)
def test_a_config_without_any_field(family: str) -> None:
    raw = {"model_type": family, "architectures": raw_of(family)["architectures"]}
    if family == "glm4_moe":  # whose 4096 are no multiple of 96 heads
        raw["head_dim"] = 128
    assert read(raw) == wanted(family, raw)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": None}),
        ("qwen2_moe", {"max_window_layers": 12}),
        ("qwen2_moe", {"use_sliding_window": False}),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"] * 15}),
        ("qwen3_moe", {"use_sliding_window": False}),
        ("qwen3_moe", {"decoder_sparse_step": 3, "mlp_only_layers": None}),
        ("qwen3_moe", {"num_local_experts": 9, "num_experts": MISSING}),
        ("qwen3_moe", {"use_qk_norm": True, "shared_expert_intermediate_size": 0, "qkv_bias": False}),
        ("glm4_moe", {"n_group": 1, "topk_group": 1}),
        ("glm4_moe", {"n_group": MISSING, "topk_group": MISSING}),
        ("glm4_moe", {"n_shared_experts": 0}),
        ("glm4_moe", {"first_k_dense_replace": 0}),
        ("glm4_moe", {"num_local_experts": 8, "n_routed_experts": MISSING}),
        ("qwen3_next", {"norm_topk_prob": False}),
        ("qwen3_next", {"layer_types": ["full_attention"] * 29 + ["linear_attention"]}),
        ("qwen3_5_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "mrope_section": [1, 1, 1]}}),
        ("qwen3_5_moe_text", {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.25}}),
        ("deepseek_v3", {"n_shared_experts": 0, "rope_interleave": True}),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 2.5, "mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 2.5, "mscale": 1.0, "mscale_all_dim": 0}}),
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
    ],
    ids=str,
)
def test_fields_that_mean_something(family: str, changes: dict[str, Any]) -> None:
    assert read(raw_of(family, **changes)) == wanted(family, raw_of(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mixtral", {"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ("qwen2_moe", {"hidden_act": "relu"}, 'activation "relu" is not supported'),
        ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}, 'activation "gelu_pytorch_tanh" is not supported'),
        ("glm4_moe", {"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ("deepseek_v3", {"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            'scoring_func is "softmax", but DeepseekV3.* knows "sigmoid" alone',
        ),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2, but DeepseekV3ForCausalLM knows 1 alone"),
        ("deepseek_v3", {"sliding_window": 64}, "sliding_window is 64, which DeepseekV3ForCausalLM does not have"),
        ("deepseek_v3", {"qk_rope_head_dim": 5}, "5 rotated dimensions a head do not form"),
        ("deepseek_v3", {"rope_interleave": 3}, "rope_interleave is 3"),
        ("glm4_moe", {"sliding_window": 64}, "sliding_window is 64, which Glm4MoeForCausalLM does not have"),
        ("glm4_moe", {"partial_rotary_factor": 0.06}, "1 rotated dimensions a head do not form"),
        ("glm4_moe", {"n_group": 5}, "24 experts do not form n_group 5 equal groups"),
        ("glm4_moe", {"n_group": 1}, "topk_group is 2, but a whole number from 1 to 1"),
        ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor is null, but a number"),
        ("glm4_moe", {"num_experts_per_tok": 13}, "num_experts_per_tok is 13, but topk_group 2 of n_group 4 have 12"),
        ("glm4_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0, but a number from"),
        ("mixtral", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported for Mixtral"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 30}, "layer_types names full_attention"),
        (
            "qwen3_moe",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 30},
            "layer_types names slid",
        ),
        ("qwen3_next", {"sliding_window": 64}, "sliding_window is 64, which Qwen3NextForCausalLM does not have"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate is false, but Qwen3NextForCausalLM has a gate"),
        ("qwen3_next", {"rope_parameters": {"mrope_section": [1, 1, 1], "factor": 2.0}}, '"factor" .2.0. is not read'),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm is false, but Qwen3MoeForCausalLM has norms"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "it belongs to a mixture of experts"),
        ("qwen3_moe", {"n_shared_experts": 2}, "n_shared_experts is 2, which Qwen3MoeForCausalLM does not have"),
        ("mixtral", {"moe_intermediate_size": 64}, "moe_intermediate_size is 64, which MixtralForCausalLM does not"),
        ("mixtral", {"n_group": 2}, "n_group is 2, which MixtralForCausalLM does not have"),
        ("qwen2_moe", {"num_local_experts": 12}, "num_local_experts is 12, which Qwen2MoeForCausalLM does not have"),
        ("glm4_moe", {"shared_expert_intermediate_size": 64}, "it belongs to a mixture of experts"),
    ],
    ids=str,
)
def test_what_a_mixture_cannot_be(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TpctlError, match=said):
        ModelConfig.from_dict({**raw_of(family), **changes})
