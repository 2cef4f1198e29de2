"""config.json of every family, in both generations of its layout; and configs that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.config_parsing import parse
from tests.unit.synthetic import make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.errors import CheckpointError, TpctlError, UnsupportedModelError


def test_sizes_and_defaults() -> None:
    config = parse()
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 2, 6, 70)
    assert parse(head_dim=...).head_dim == 6
    assert parse(head_dim=None).head_dim == 6
    assert parse(num_key_value_heads=...).num_kv_heads == 4
    assert not parse(tie_word_embeddings=...).tie_word_embeddings


def test_biases_follow_the_family_and_the_config() -> None:
    assert [parse("qwen2").qkv_bias, parse("qwen2").o_bias, parse("qwen2").mlp_bias] == [True, False, False]
    both = parse("llama", attention_bias=True, mlp_bias=True)
    assert [both.qkv_bias, both.o_bias, both.mlp_bias] == [True, True, True]
    with pytest.raises(UnsupportedModelError, match="attention_bias is true, which tpctl does not know of MistralFor"):
        ModelConfig.from_dict({**make_config("mistral"), "attention_bias": True})
    assert parse("qwen3", attention_bias=True).o_bias


def test_windows() -> None:
    assert parse("mistral", sliding_window=16).windows == (16, 16)
    assert parse("mistral", sliding_window=None).windows == (None, None)
    assert parse("llama", sliding_window=128).windows == (None, None)
    with pytest.raises(UnsupportedModelError, match="sliding_window is 16, which LlamaForCausalLM does not have"):
        parse("llama", sliding_window=16)
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2
    assert parse("llama", layer_types=full).windows == (None, None)
    assert parse("mistral", sliding_window=16, layer_types=sliding).windows == (16, 16)
    with pytest.raises(UnsupportedModelError, match="but MistralForCausalLM has its sliding_window"):
        parse("mistral", sliding_window=16, layer_types=full)
    with pytest.raises(CheckpointError, match="names sliding_attention, but no sliding_window is in use"):
        parse("qwen2", sliding_window=16, layer_types=sliding)
    assert parse("qwen2", sliding_window=16).windows == (None, None)
    assert parse("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1).windows == (None, 16)
    kinds = ["sliding_attention", "full_attention"]
    assert parse("qwen3", sliding_window=16, use_sliding_window=True, layer_types=kinds).windows == (16, None)


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config(eos_token_id=2)))
    assert ModelConfig.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 700]}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 700, but the vocabulary has"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("torch_dtype", "float16"), ("dtype", "torch.float16")])
def test_dtype_by_either_name(field: str, value: str) -> None:
    assert parse(**{"dtype": ..., field: value}).dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            'model_type "gpt2" is not supported; tpctl runs cohere2, deepseek_v3, gemma2, ',
        ),
        ({"model_type": None}, "model_type null is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, 'architecture "LlamaForSequenceClassification" of'),
        ({"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ({"quantization_config": {"quant_method": "hqq"}}, r'quantised \("hqq"\)'),
        ({"rope_scaling": {"rope_type": "spiral"}}, 'RoPE kind "spiral" is not supported'),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported for LlamaForCausalLM"),
        ({"dtype": "int8"}, 'dtype "int8" is not supported'),
        ({"dtype": 5}, "dtype 5 is not supported"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000, but a whole number from 1 to 21474"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, but a number from 1e-30 to 1 is needed"),
        ({"rms_norm_eps": 1e18}, r"rms_norm_eps is 1e\+18, but a number from 1e-30 to 1 is needed"),
        ({"rms_norm_eps": 10**400}, "but a number from 1e-30 to 1 is needed"),
        ({"rope_theta": 1e-9}, r"rope_theta is 1e-09, but a number from 2 to 1e\+18 is needed"),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity, but a number from 2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but a whole number from 1 to 10000"),
        ({"num_attention_heads": 10**6}, "num_attention_heads is 1000000, but a whole number from 1 to 4096"),
        ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings is 2147483647, but a whole number from 1 to"),
        ({"rope_scaling": {"type": "linear", "factor": 1e6}}, "a RoPE factor of 1000000.0 makes 128000000 positions"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor is null, but a number from 0.001 to"),
        ({"eos_token_id": -1}, "config.json: eos_token_id is -1, but the vocabulary has the tokens 0 to 69"),
        ({"eos_token_id": [2, 70]}, "eos_token_id is 70, but the vocabulary has the tokens 0 to 69"),
        ({"bos_token_id": 70}, "bos_token_id is 70, but the vocabulary has the tokens 0 to 69"),
        ({"eos_token_id": 10**30}, "eos_token_id is 1000000000000000000000000000000, but the vocabulary"),
        ({"hidden_size": 0}, "hidden_size is 0, but a whole number from 1 to 2147483647 is needed"),
        ({"num_hidden_layers": "two"}, 'num_hidden_layers is "two"'),
        ({"vocab_size": True}, "vocab_size is true"),
        ({"num_key_value_heads": "2"}, 'num_key_value_heads is "2"'),
        ({"head_dim": 6.0}, r"head_dim is 6\.0"),
        ({"head_dim": None, "hidden_size": 25}, "hidden_size 25 is no multiple of num_attention_heads 4"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, '"llama3" needs "low_freq_factor"'),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor is "2", but a number from 0.001 to'),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear", but an object is needed'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, but a number from 1e-30 to 1 is needed"),
        ({"rope_theta": "big"}, 'rope_theta is "big", but a number from 2 to'),
    ],
)
def test_contradictory_configs_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmo2", {"num_key_value_heads": 2.5}, "num_key_value_heads is 2.5, but a whole number"),
        ("olmo2", {"sliding_window": 64}, "sliding_window is 64, which Olmo2ForCausalLM does not have"),
        ("olmo3", {"rms_norm_eps": -1}, "rms_norm_eps is -1, but a number"),
        ("olmo3", {"sliding_window": None}, "layers have sliding attention, but no sliding_window is in use"),
        ("olmo3", {"rope_parameters": {"rope_type": "default"}}, 'rope_parameters has "rope_type", but the RoPE of'),
        ("cohere2", {"layer_norm_eps": None}, "layer_norm_eps is null, but a number"),
        ("cohere2", {"hidden_size": 70, "head_dim": None}, "hidden_size 70 is no multiple of num_attention_heads 4"),
        ("cohere2", {"sliding_window": None}, "layers have sliding attention, but no sliding_window is in use"),
        ("cohere2", {"logit_scale": 0}, "logit_scale is 0, but a number from 1e-06"),
        ("glm4", {"num_key_value_heads": "2"}, 'num_key_value_heads is "2", but a whole number'),
        ("glm4", {"attention_bias": 1}, "attention_bias is 1, but true or false"),
        ("glm4", {"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ("glm4", {"partial_rotary_factor": 0.5}, "3 rotated dimensions a head do not form pairs"),
        ("granite", {"mlp_bias": "no"}, 'mlp_bias is "no", but true or false'),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0, but a number from 1e-06"),
        ("granite", {"logit_scale": 0.0625}, "logit_scale is 0.0625, which GraniteForCausalLM does not have"),
        ("smollm3", {"architectures": ["LlamaForCausalLM"]}, "tpctl runs SmolLM3ForCausalLM"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 number for 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers is \[1, 2\], but a list of whole numbers up to 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, but a whole number from 1"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}, "names sliding_attention, but no"),
        ("gpt_oss", {"sliding_window": None}, "layers have sliding attention, but no sliding_window is in use"),
        ("gpt_oss", {"rope_scaling": {"rope_type": "yarn", "factor": "8"}}, 'factor is "8", but a number'),
        (
            "minimax_m2",
            {"use_qk_norm": False},
            "use_qk_norm is false, but MiniMaxM2ForCausalLM knows true alone",
        ),
        ("minimax_m2", {"qk_norm_type": "per_head"}, 'qk_norm_type is "per_head", but'),
        ("minimax_m2", {"rotary_dim": 7}, "rotary_dim is 7, but a whole number from 1 to 6"),
        (
            "minimax_m2",
            {"rotary_dim": 4, "partial_rotary_factor": 0.5},
            "rotary_dim is 4 of 6, but partial_rotary_factor",
        ),
    ],
)
def test_wrong_fields_of_one_family_are_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TpctlError, match=message):
        ModelConfig.from_dict(make_config(family, **changes))


def test_layer_types_of_another_length() -> None:
    with pytest.raises(CheckpointError, match="layer_types has 1 kind for 2 layers"):
        parse("qwen2", sliding_window=4, use_sliding_window=True, layer_types=["full_attention"])


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\xff"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is not a Hugging Face checkpoint"):
        ModelConfig.load(tmp_path)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]), st.text(max_size=2)),
)
FIELDS = sorted(
    {*make_config(), "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"}
    | {"eos_token_id", "bos_token_id", "quantization_config", "partial_rotary_factor", "max_window_layers"}
    | {"original_max_position_embeddings", "attention_bias", "mlp_bias", "torch_dtype"}
)


@given(family=st.sampled_from(sorted(FAMILIES)), changes=st.dictionaries(st.sampled_from(FIELDS), junk, max_size=3))
def test_junk_in_any_field_is_accepted_or_refused_in_one_line(family: str, changes: dict[str, Any]) -> None:
    try:
        parse(family, **changes)
    except TpctlError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 256),
        ("logit_scale", 0.0625),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("use_qk_norm", True),
        ("is_causal", False),
        ("attention_chunk_size", 8192),
        ("no_rope_layers", [1, 0]),
        ("num_local_experts", 8),
        ("moe_intermediate_size", 768),
        ("kv_lora_rank", 512),
        ("rope_condense_ratio", 8),
        ("per_layer_config", {"0": {"sliding_window": 4}}),
        ("transformers_weights", "other.safetensors"),
        ("compression_config", {"quant_method": "hqq"}),
    ],
)
def test_fields_of_other_models_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=field if field != "compression_config" else "quantised"):
        parse(**{field: value})


def test_fields_that_say_nothing_are_let_through() -> None:
    """As configs on the Hub have them, or as engines do not read them."""
    plain = parse()
    harmless: dict[str, Any] = {
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "use_cache": False,
        "pad_token_id": -1,
        "auto_map": {"a": "b"},
        "rope_interleaved": False,
        "is_llama_config": True,
        "use_mrope": False,
        "ffn_dim_multiplier": 1.3,
        "final_logit_softcapping": None,
        "logit_scale": 1,
        "num_experts": 0,
        "is_causal": True,
        "per_layer_config": {},
        "query_pre_attn_scalar": 6,
        "no_rope_layers": [1, 1],
        "transformers_weights": "model.safetensors",
        "original_max_position_embeddings": 64,
        "initializer_range": 0.02,
        "_name_or_path": "x",
        "sliding_window": None,
    }
    assert parse(**harmless) == plain
