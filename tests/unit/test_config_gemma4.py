"""What configs of Gemma 4 and Ministral 3 mean, published ones and those that lack a field or have null in it: what
transformers' classes and rotary tables make of them."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.config_fields import MISSING
from tpctl.arch.config import ModelConfig
from tpctl.arch.windows import FULL, SLIDING
from tpctl.checkpoint.metadata import read_metadata
from tpctl.errors import CheckpointError, TpctlError, UnsupportedModelError
from tpctl.layers.rotary import attention_scale, inverse_frequencies
from tpctl.planning.fit import Budget, plan_model

ROPES: dict[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
}
GEMMA4: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 24,
    "global_head_dim": 48,
    "intermediate_size": 40,
    "vocab_size": 4000,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
    "rope_parameters": ROPES,
    "tie_word_embeddings": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": True,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "layer_types": [SLIDING, FULL] * 4,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "enable_moe_block": False,
    "num_experts": None,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
}
OTHER_ROPES = {
    SLIDING: {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0},
    FULL: {"rope_type": "proportional", "rope_theta": 900.0, "partial_rotary_factor": 0.6, "factor": 3.0},
}
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other RoPE": {"rope_parameters": OTHER_ROPES, "attention_k_eq_v": False, "num_kv_shared_layers": 0},
    "all of them": {"rope_parameters": {**ROPES, FULL: {"rope_type": "proportional", "rope_theta": 900.0}}},
    "default twice": {"rope_parameters": {**ROPES, FULL: {"rope_type": "default", "rope_theta": 900.0}}},
}


def by_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING["gemma4_text"](**deepcopy(raw))
        table, ends = Gemma4TextRotaryEmbedding(config), config.eos_token_id
    if config.sliding_window is None:
        raise ValueError("no mask can be made of this")
    heads = [(one.head_dim, one.num_key_value_heads) for one in config.per_layer_config]
    modes = config.kv_sharing_modes
    double = config.use_double_wide_mlp
    return {
        "layers": [
            (
                config.sliding_window if kind == SLIDING else None,
                *of_layer,
                mode == "reuse",
                mode == "store" and "reuse" in modes,
                config.intermediate_size * (2 if double and mode == "reuse" else 1),
            )
            for kind, of_layer, mode in zip(config.layer_types, heads, modes, strict=True)
        ],
        "tables": [getattr(table, f"{kind}_inv_freq").tolist() for kind in config.layer_types],
        "held": [
            "q" if mode == "reuse" else "qk" if config.attention_k_eq_v and kind == FULL else "qkv"
            for kind, mode in zip(config.layer_types, modes, strict=True)
        ],
        "sizes": (config.hidden_size, config.vocab_size, config.rms_norm_eps, config.num_attention_heads),
        "switches": (config.tie_word_embeddings, config.attention_bias, config.final_logit_softcapping),
        "own": config.hidden_size_per_layer_input,
        "ends": (config.bos_token_id, ends if isinstance(ends, list) else [] if ends is None else [ends]),
    }


def by_us(raw: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig.from_dict({**raw, "model_type": "gemma4_text"})
    made_of = config.blueprint
    attentions: list[Any] = [block.attention for block in made_of.blocks]
    return {
        "layers": [
            (one.window, one.head_dim, one.num_kv_heads, one.reads is not None, one.shared, block.mlp.down.inputs)
            for one, block in zip(attentions, made_of.blocks, strict=True)
        ],
        "tables": [inverse_frequencies(one.rope).tolist() for one in attentions],
        "held": [one.held for one in attentions],
        "sizes": (made_of.hidden_size, made_of.vocab_size, made_of.norm.eps, attentions[0].num_heads),
        "switches": (made_of.tied, attentions[0].qkv.bias, made_of.logit_softcap),
        "own": made_of.blocks[0].input.gate.outputs if made_of.blocks[0].input is not None else 0,
        "ends": (config.bos_token_id, list(config.eos_token_ids)),
    }


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(("key", "value"), [("", None), *((key, one) for key in GEMMA4 for one in (MISSING, None))])
def test_a_field_that_is_missing_or_null(key: str, value: Any, changes: str) -> None:
    raw = {**GEMMA4, **CHANGES[changes], **({key: value} if key else {})}
    raw = {name: given for name, given in raw.items() if given is not MISSING}
    try:
        expected = by_transformers(raw)
    except Exception:  # of many kinds, from the depths of its checks
        with pytest.raises(TpctlError, match="layers" if key in ("num_hidden_layers", "layer_types") else key):
            by_us(raw)
        return
    found = by_us(raw)
    torch.testing.assert_close(found.pop("tables"), expected.pop("tables"), rtol=1e-6, atol=0)
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention is "all", which is not supported'),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*, which Gemma 4 does not read"),
        ({"rope_parameters": {SLIDING: ROPES[SLIDING]}}, "rope_theta is null"),
        ({"rope_parameters": ROPES[FULL]}, 'rope_parameters has "partial_rotary_factor", but the RoPE of'),
        ({"rope_parameters": {**ROPES, FULL: {**ROPES[FULL], "rope_type": "longrope"}}}, 'RoPE kind "longrope"'),
        ({"rope_parameters": {**ROPES, FULL: {**ROPES[FULL], "rope_type": "default"}}}, "partial_rotary_factor 0.25"),
        ({"rope_parameters": {**ROPES, FULL: {**ROPES[FULL], "beta_fast": 3}}}, '"beta_fast" .* is not read by the'),
        (
            {"num_kv_shared_layers": 0, "per_layer_config": {"7": {"head_dim": 12}}},
            "layers of full_attention have heads of 12 and of 24",
        ),
        ({"per_layer_config": {"7": {"num_key_value_heads": 1}}}, "layer 7 has other heads than layer 3, whose keys"),
        ({"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0, which Gemma4ForCausalLM does not have"),
    ],
)
def test_what_gemma_4_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TpctlError, match=said):
        by_us({**GEMMA4, **changes})


def test_a_table_of_fewer_tokens_is_cut_and_not_run() -> None:
    config = ModelConfig.from_dict({**GEMMA4, "model_type": "gemma4_text", "vocab_size_per_layer_input": 3999})
    with pytest.raises(
        UnsupportedModelError, match="embeddings for each layer of 3999 tokens out of 4000, which tpctl cuts"
    ):
        config.blueprint.check_runs()


PUBLISHED: dict[str, dict[str, Any]] = {
    "E2B": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "sliding_window": 512,
        "layer_types": [FULL if layer % 5 == 4 else SLIDING for layer in range(35)],
    },
    "31B": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "num_experts": None,
        "top_k_experts": None,
        "hidden_size_per_layer_input": 0,
        "layer_types": [FULL if layer % 6 == 5 else SLIDING for layer in range(60)],
    },
    "26B-A4B": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "layer_types": [FULL if layer % 6 == 5 else SLIDING for layer in range(30)],
    },
}
"""The fields of published text models that differ from the class's."""
FACTS = {
    "E2B": (4.6e9, 15, 20, 35 * 256),
    "31B": (30.7e9, 60, 0, 0),
    "26B-A4B": (25.2e9, 30, 0, 0),
}
"""Weights; layers that keep keys and values, and that read others'; numbers of a token's own embeddings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    text = {**PUBLISHED[name], "final_logit_softcapping": 30.0, "model_type": "gemma4_text", "eos_token_id": 1}
    whole = {"model_type": "gemma4", "dtype": "bfloat16", "text_config": text, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = ModelConfig.load(tmp_path)
    assert config.eos_token_ids == (1, 106)
    report = plan_model(read_metadata(str(tmp_path)), Budget())
    weights, keep, read, own = FACTS[name]
    assert abs(report.parameters / weights - 1) < 0.02
    assert (len(config.blueprint.attentions), report.reading) == (keep, read)
    tables = [part for part in config.blueprint.beside if part.name.endswith("embed_tokens_per_layer")]
    assert sum(table.inputs for table in tables) == own
    assert report.not_on_gpus is None and report.not_run is None
    # What a token reads is without the tables that it looks up.
    first = next(size for size in report.sizes if size.tp_size == 1)
    assert first.weight_bytes - first.read_bytes >= 2 * own * 262144


MINISTRAL3: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@pytest.mark.parametrize(
    "rope", ["absent", None, MINISTRAL3, MINISTRAL3 | {"mscale": 0.5, "max_position_embeddings": 9}]
)
@pytest.mark.parametrize("window", ["absent", None, 4096])
def test_ministral_3_rotates_and_scales_as_transformers_does(rope: Any, window: Any) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding, get_llama_4_attn_scale

    from tpctl.layers.rotary import RotaryTable

    raw = {key: one for key, one in {"rope_parameters": rope, "sliding_window": window}.items() if one != "absent"}
    theirs = CONFIG_MAPPING["ministral3"](**deepcopy(raw))
    table = Ministral3RotaryEmbedding(theirs)
    blueprint = ModelConfig.from_dict({"model_type": "ministral3", **raw}).blueprint
    ours = blueprint.blocks[0].attention.rope
    assert ours is not None and blueprint.windows == (theirs.sliding_window,) * 34
    torch.testing.assert_close(inverse_frequencies(ours), table.inv_freq, rtol=1e-6, atol=0)
    assert attention_scale(ours) == pytest.approx(table.attention_scaling)
    positions, params = torch.tensor([0, 16383, 16384, 100000]), theirs.rope_parameters
    beta, length = params["llama_4_scaling_beta"], params["original_max_position_embeddings"]
    growth = RotaryTable(ours, 8, "cpu").growth(positions)
    torch.testing.assert_close(growth, get_llama_4_attn_scale(positions[None], beta, length).flatten())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama_4_scaling_beta": None}, "llama_4_scaling_beta is null"),
        ({"rope_type": "default", "original_max_position_embeddings": ...}, "no original_max_position_embeddings"),
        ({"surprise": 3.0}, '"surprise" .* is not read by the kind "yarn"'),
    ],
)
def test_what_ministral_3_cannot_be(changes: dict[str, Any], said: str) -> None:
    rope = {key: value for key, value in {**MINISTRAL3, **changes}.items() if value is not ...}
    if changes.get("rope_type") == "default":
        rope = {key: rope[key] for key in ("rope_type", "rope_theta", "llama_4_scaling_beta")}
    with pytest.raises((CheckpointError, UnsupportedModelError), match=said):
        ModelConfig.from_dict({"model_type": "ministral3", "rope_parameters": rope})
