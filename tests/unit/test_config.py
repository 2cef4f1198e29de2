"""config.json of every family, in both generations of its layout; and configs that are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.synthetic import make_config
from tpctl.errors import CheckpointError, TpctlError, UnsupportedModelError
from tpctl.models.config import ModelConfig
from tpctl.models.specs import FAMILIES


def parse(family: str = "llama", **changes: Any) -> ModelConfig:
    raw = make_config(family, **changes)
    return ModelConfig.from_dict({key: value for key, value in raw.items() if value is not ...})


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
    assert not parse("mistral", attention_bias=True).qkv_bias
    assert parse("qwen3", attention_bias=True).o_bias


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_both_layouts_of_rope_settings_are_the_same() -> None:
    old = parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = parse(rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old.rope == new.rope
    assert (old.rope.kind, old.rope.theta, old.rope.original_max_position_embeddings) == ("llama3", 5e5, 64)
    both = parse(
        rope_theta=5e5,
        rope_scaling={"type": "llama3", **LLAMA3},
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    )
    assert both.rope == old.rope
    assert parse(rope_scaling=None).rope.kind == "default"
    assert parse(rope_scaling={"type": "linear", "factor": 2.0}).rope.kind == "linear"


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 4.0}}, r"factor differs: 8\.0 and 4\.0"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "high_freq_factor differs: 4.0 and null"),
        ({"rope_scaling": {"rope_type": "default"}}, "factor differs: 8.0 and null"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 1e4},
            "rope_theta differs: 500000.0 and 10000",
        ),
    ],
)
def test_two_layouts_that_disagree(changes: dict[str, Any], differs: str) -> None:
    with pytest.raises(CheckpointError, match=f"rope_parameters and rope_scaling, and their {differs}"):
        parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, **changes)


def test_the_first_name_of_longrope_and_partial_rotation() -> None:
    scaling = {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    rope = parse("phi3", rope_scaling=scaling, original_max_position_embeddings=32).rope
    assert (rope.kind, rope.original_max_position_embeddings) == ("longrope", 32)
    assert parse("phi3", head_dim=8, partial_rotary_factor=0.75).rope.rotary_dim == 6


def test_windows() -> None:
    assert parse("mistral", sliding_window=16).windows == (16, 16)
    assert parse("mistral", sliding_window=None).windows == (None, None)
    assert parse("llama", sliding_window=16).windows == (None, None)
    assert parse("qwen2", sliding_window=16).windows == (None, None)
    assert parse("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1).windows == (None, 16)
    kinds = ["sliding_attention", "full_attention"]
    assert parse("qwen3", sliding_window=16, use_sliding_window=True, layer_types=kinds).windows == (16, None)


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config(eos_token_id=2)))
    assert ModelConfig.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(("field", "value"), [("torch_dtype", "float16"), ("dtype", "torch.float16")])
def test_dtype_by_either_name(field: str, value: str) -> None:
    assert parse(**{"dtype": ..., field: value}).dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, 'model_type "gpt2" is not supported; tpctl knows llama, mistral, phi3, qwen2, qwen3'),
        ({"model_type": None}, "model_type null is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, 'architecture "LlamaForSequenceClassification" of'),
        ({"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ({"quantization_config": {"quant_method": "awq"}}, r'quantised \("awq"\)'),
        ({"rope_scaling": {"rope_type": "spiral"}}, 'RoPE kind "spiral" is not supported'),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported for LlamaForCausalLM"),
        ({"dtype": "int8"}, 'dtype "int8" is not supported'),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000, but a positive whole number of less"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, but a positive number is needed"),
        ({"hidden_size": 0}, "hidden_size is 0, but a positive whole number of less than 2.31 is needed"),
        ({"num_hidden_layers": "two"}, 'num_hidden_layers is "two"'),
        ({"vocab_size": True}, "vocab_size is true"),
        ({"num_key_value_heads": "2"}, 'num_key_value_heads is "2"'),
        ({"head_dim": 6.0}, r"head_dim is 6\.0"),
        ({"head_dim": None, "hidden_size": 25}, "hidden_size 25 is no multiple of num_attention_heads 4"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, '"llama3" needs "low_freq_factor"'),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor is "2", but a positive number is needed'),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear", but an object is needed'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, but a positive number is needed"),
        ({"rope_theta": "big"}, 'rope_theta is "big", but a positive number is needed'),
    ],
)
def test_contradictory_configs_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(**changes)


def test_layer_types_of_another_length() -> None:
    with pytest.raises(CheckpointError, match="layer_types has 1 entries for 2 layers"):
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
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "short_factor has 1 numbers, but 8"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            "low_freq_factor 4 must be below high_freq_factor 4",
        ),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": "32"}, "beta_fast"),
        ({"full_attention": {"rope_type": "default"}}, "by layer type"),
    ],
)
def test_rope_numbers_that_make_no_table_are_refused(rope: dict[str, object], message: str) -> None:
    raw = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rope_parameters": rope,
    }
    with pytest.raises(TpctlError, match=re.escape(message)):
        ModelConfig.from_dict(raw)


def test_a_yarn_factor_extends_the_longest_sequence() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert parse("qwen2", max_position_embeddings=32, rope_parameters=yarn).max_position_embeddings == 128
