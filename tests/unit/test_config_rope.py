"""Settings of rotary embeddings, in both layouts that config.json has had, and those that are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.unit.config_parsing import parse
from tests.unit.synthetic import make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.errors import CheckpointError, TpctlError, UnsupportedModelError, UsageError
from tpctl.wire.settings import EngineSettings

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


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"type": None, "factor": 2.0}, r'"factor" \(2.0\) is not read by the kind "default"; correct rope_type'),
        ({"factor": 8}, r'"factor" \(8\) is not read by the kind "default"'),
        ({"rope_type": "default", **LLAMA3}, 'is not read by the kind "default"'),
        ({"rope_type": "default", "mrope_section": [1, 1, 1]}, r'"mrope_section" \(\[1, 1, 1\]\) is not read by'),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 32},
            r'"beta_fast" \(32\) is not read by the kind "li',
        ),
        ({"rope_type": "llama3", **LLAMA3, "attention_factor": 1.2}, '"attention_factor" .* is not read by the kind'),
        ({"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}, '"llama_4_scaling_beta" .* "yarn"'),
    ],
)
def test_a_rope_setting_that_its_kind_does_not_read_is_refused(rope: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        parse(rope_scaling=rope)


def test_a_rope_setting_that_says_nothing_is_taken() -> None:
    nothing = {"type": None, "factor": 1.0, "attention_factor": None, "beta_fast": None, "attn_factor": 1}
    assert parse(rope_scaling=nothing).rope.kind == "default"
    trained = {"type": "yarn", "factor": 2.0, "finetuned": True, "original_max_position_embeddings": 64}
    assert parse(rope_scaling=trained).rope.kind == "yarn"


def test_the_first_name_of_longrope_and_partial_rotation() -> None:
    scaling = {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    rope = parse("phi3", rope_scaling=scaling, original_max_position_embeddings=32).rope
    assert (rope.kind, rope.original_max_position_embeddings) == ("longrope", 32)
    assert parse("phi3", head_dim=8, partial_rotary_factor=0.75).rope.rotary_dim == 6


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "short_factor has 1 number, but a head has 8 rotated pairs",
        ),
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


@pytest.mark.parametrize(
    ("family", "rope", "outer", "message"),
    [
        (
            "llama",
            {"rope_type": "llama3", **LLAMA3},
            32,
            "original_max_position_embeddings is 64, but the one beside it",
        ),
        (
            "phi3",
            {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
            | {"original_max_position_embeddings": 64},
            None,
            "is 64, but the one that Phi3ForCausalLM has where the config gives none is 4096",
        ),
        (
            "phi3",
            {"type": "linear", "factor": 2.0},
            None,
            '"linear" is not supported for Phi3ForCausalLM; tpctl knows def',
        ),
        ("llama", {"type": "dynamic", "factor": 2.0}, None, '"dynamic" is not supported for LlamaForCausalLM'),
        (
            "llama",
            {"type": "yarn", "factor": 2.0, "attn_factor": 0.7},
            None,
            r"RoPE setting attn_factor \(0.7\) is not",
        ),
    ],
)
def test_rope_settings_that_contradict_or_are_not_known(
    family: str, rope: dict[str, Any], outer: int | None, message: str
) -> None:
    with pytest.raises(TpctlError, match=message):
        parse(family, rope_scaling=rope, original_max_position_embeddings=... if outer is None else outer)


def test_a_linear_factor_extends_the_longest_sequence() -> None:
    """Vicuna's 16k: 4096 positions, stretched four times; the other fields stay those of Llama 2."""
    vicuna = parse(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 4.0})
    assert vicuna.max_position_embeddings == 16384
    assert (vicuna.rope.max_position_embeddings, vicuna.rope.params["factor"]) == (4096, 4.0)


def test_a_yarn_factor_may_be_null() -> None:
    """It is then the ratio of the two lengths, as in transformers."""
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    assert parse(rope_scaling=yarn).rope.params["factor"] == 4.0


def test_a_yarn_factor_extends_the_longest_sequence() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert parse("qwen2", max_position_embeddings=32, rope_parameters=yarn).max_position_embeddings == 128


CHUNKED = {"chunk_size": 96, "local_size": 8, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_dual_chunk_attention_bounds_the_longest_sequence(family: str) -> None:
    """As Qwen2.5-1M has it: within a chunk, and the length before it was stretched, it is attention as ever."""
    raw = make_config(model_type=family, architectures=[FAMILIES[family].architecture], max_position_embeddings=256)
    plain, found = ModelConfig.from_dict(raw), ModelConfig.from_dict({**raw, "dual_chunk_attention_config": CHUNKED})
    assert (plain.max_position_embeddings, plain.beyond) == (256, "")
    assert (found.max_position_embeddings, found.blueprint) == (64, plain.blueprint)
    assert (
        found.beyond
        == "from there up to 256 it takes dual chunk attention (dual_chunk_attention_config), which tpctl does not have"
    )
    within = ModelConfig.from_dict({**raw, "max_position_embeddings": 64, "dual_chunk_attention_config": CHUNKED})
    assert (within.max_position_embeddings, within.beyond) == (64, "")
    short = {**CHUNKED, "chunk_size": 48}
    assert ModelConfig.from_dict({**raw, "dual_chunk_attention_config": short}).max_position_embeddings == 48
    for none in (None, {}):
        assert ModelConfig.from_dict({**raw, "dual_chunk_attention_config": none}) == plain
    with pytest.raises(
        UsageError, match=r"128 is not between 2 and 64, .* limit: from there up to 256 it takes dual chunk"
    ):
        EngineSettings(max_model_len=128).longest(found.max_position_embeddings, found.beyond)


@pytest.mark.parametrize(
    ("chunked", "others", "error"),
    [
        ({**CHUNKED, "sparse": True}, {}, 'dual_chunk_attention_config with "sparse" is not supported; to run'),
        (
            CHUNKED,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "_config beside a RoPE that is stretched is not",
        ),
        ({**CHUNKED, "chunk_size": "96"}, {}, 'chunk_size is "96", but a whole number'),
        ({**CHUNKED, "local_size": 0.5}, {}, "local_size is 0.5, but a whole number"),
        ({"chunk_size": 96, "local_size": 8}, {}, "original_max_position_embeddings is null, but a whole number"),
        (7, {}, "dual_chunk_attention_config is 7, but an object is needed"),
    ],
)
def test_dual_chunk_attention_of_other_kinds_is_refused(chunked: Any, others: dict[str, Any], error: str) -> None:
    with pytest.raises(TpctlError, match=error):
        ModelConfig.from_dict(make_config(dual_chunk_attention_config=chunked, **others))
