"""The conversion of GGUF files: equal to the model they were written from, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.described import described
from tests.unit.gguf_files import (
    CONTEXT,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    LONG,
    SHORT,
    TEMPLATE,
    TOKENS,
    Weights,
    floats,
    random_weights,
    stored_tensors,
    tiny_config,
    write_file,
    write_gguf,
)
from tpctl.arch.config import ModelConfig
from tpctl.checkpoint.gguf import convert_gguf
from tpctl.checkpoint.safetensors import read_header

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def convert(path: Path) -> Path:
    folder = path.with_name("out")
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


def stored_weights(folder: Path) -> Weights:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    found = {}
    for name, info in read_header(path).tensors.items():
        assert info.dtype == "BF16"
        bits = np.frombuffer(data[info.start : info.stop], dtype=np.uint16).astype(np.uint32) << 16
        found[name] = bits.view(np.float32).reshape(info.shape)
    return found


def assert_equal_weights(found: Weights, expected: Weights) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_weights_config_tokenizer_and_template_survive(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    weights = write_gguf(tmp_path / "tiny.gguf")
    folder = convert(tmp_path / "tiny.gguf")
    assert_equal_weights(stored_weights(folder), weights)
    config = described(ModelConfig.load(folder))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.rope.kind, config.rope.theta, config.vocab_size) == ("default", 10000.0, len(TOKENS))
    assert config.eos_token_ids == (1,)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>ab").ids == [1, TOKENS.index("ab")]


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "gemma 3": (
        {"model_type": "gemma3_text", "tie_word_embeddings": True, "num_hidden_layers": 7, "rope_theta": 1000000.0},
        {
            "gemma3.attention.sliding_window": 16,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
            "gemma3.final_logit_softcapping": 20.0,
        },
        {},
    ),
    "llama with biases": ({"attention_bias": True, "mlp_bias": True}, {}, {}),
    "llama, tied": ({"tie_word_embeddings": True}, {}, {}),
    "llama 3.1": ({}, {"llama.rope.freq_base": 500000.0}, {"rope_freqs.weight": floats(1, 1, 8, 8)}),
    "linear": ({}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {}),
    "linear, as it was": ({}, {"llama.rope.scale_linear": 4.0}, {}),
    "mistral": ({"model_type": "mistral"}, {"llama.attention.sliding_window": 16}, {}),
    "qwen2": ({"model_type": "qwen2"}, {}, {}),
    "qwen2, yarn": (
        {"model_type": "qwen2"},
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 16,
        },
        {},
    ),
    "qwen3": ({"model_type": "qwen3", "head_dim": 16}, {}, {}),
    "phi3": ({"model_type": "phi3"}, {"phi3.attention.sliding_window": 16}, {}),
    "phi 3.5": (
        {"model_type": "phi3"},
        {
            "phi3.rope.scaling.original_context_length": 16,
            "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(16)),
        },
        {"rope_factors_short.weight": floats(*SHORT), "rope_factors_long.weight": floats(*LONG)},
    ),
    "phi 4 mini": (
        {"model_type": "phi3", "tie_word_embeddings": True},
        {
            "phi3.rope.dimension_count": 6,
            "phi3.rope.scaling.original_context_length": 16,
            "phi3.rope.scaling.attn_factor": 1.25,
        },
        {"rope_factors_short.weight": floats(*SHORT[:3]), "rope_factors_long.weight": floats(*LONG[:3])},
    ),
}
EXPECTED: dict[str, dict[str, Any]] = {
    "gemma 3": {
        "sliding_window": 16,
        "query_pre_attn_scalar": HEAD_DIM,
        "final_logit_softcapping": 20.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {},
    "llama 3.1": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
            **LLAMA3,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "linear, as it was": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": False},
    "qwen2, yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen3": {"attention_bias": False},
    "phi3": {"sliding_window": 16, "pad_token_id": None},
    "phi 3.5": {
        "original_max_position_embeddings": 16,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 16,
        },
    },
    "phi 4 mini": {
        "original_max_position_embeddings": 16,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": SHORT[:3],
            "long_factor": LONG[:3],
            "original_max_position_embeddings": 16,
            "attention_factor": 1.25,
            "partial_rotary_factor": 0.75,
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_converted_model_computes_what_the_original_does(tmp_path: Path, name: str) -> None:
    """Against transformers with the config that the model had before it became a GGUF, and all of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    changes, keys, extra = FAMILIES[name]
    config = tiny_config(changes.get("model_type", "llama"), **changes)
    if name == "llama 3.1":
        extra = {"rope_freqs.weight": llama3_divisors(500000.0)}
    weights = write_gguf(tmp_path / "tiny.gguf", config, keys=keys, add=extra)
    folder = convert(tmp_path / "tiny.gguf")
    assert_equal_weights(stored_weights(folder), weights)
    expected = {**config, "dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, **EXPECTED[name]}
    if "rope_parameters" in expected:
        del expected["rope_theta"]
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(**expected)).eval()
    missing, unused = original.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unused and set(missing) <= {"lm_head.weight"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is type(original)
    generator = torch.Generator().manual_seed(0)
    for length in (12, 40):  # before and behind the end of the original context, and of the window
        ids = torch.randint(len(TOKENS), (1, length), generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    read = ModelConfig.load(folder)
    assert (read.model_type, read.blueprint.tied) == (config["model_type"], config["tie_word_embeddings"])


def llama3_divisors(theta: float) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3.1, by transformers' own computation."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": theta, "original_max_position_embeddings": 8192, **LLAMA3}
    scaled = ROPE_INIT_FUNCTIONS["llama3"](
        AutoConfig.for_model("llama", head_dim=HEAD_DIM, rope_parameters={**rope, "rope_type": "llama3"}), None
    )[0].numpy()
    divisors = theta ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / scaled
    assert divisors.min() == pytest.approx(1.0) and divisors.max() == pytest.approx(8.0)
    return divisors.astype(np.float32)


def test_two_conversions_are_equal_to_the_byte(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    first = convert(tmp_path / "tiny.gguf").rename(tmp_path / "first")
    second = convert(tmp_path / "tiny.gguf")
    assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in second.iterdir())
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_a_quantised_tensor_is_what_the_gguf_package_makes_of_it(tmp_path: Path) -> None:
    """Rounded once more to bfloat16, as torch rounds; in bands whose borders fall within the tensor."""
    import gguf
    import torch

    from tpctl.checkpoint.gguf import weights as module

    config = tiny_config(hidden_size=64, head_dim=16)
    weights = random_weights(config)
    weights = {name: weight * 1.0625**2 if weight.ndim == 2 else weight for name, weight in weights.items()}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, config, weights=weights)
    stored = stored_tensors(config, weights)
    kinds = {"blk.0.attn_q.weight": "Q4_0", "blk.0.ffn_up.weight": "Q8_0", "token_embd.weight": "F16"}
    packed = {name: gguf.quantize(stored[name], gguf.GGMLQuantizationType[kind]) for name, kind in kinds.items()}
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == len(stored)
    _rewrite(path, config, stored, packed, kinds)
    folder = convert(path)
    found = stored_weights(folder)
    small = tmp_path / "small"
    small.mkdir()
    original, module._BAND = module._BAND, 100
    try:
        module.write_weights(module.GgufModel.read(path), small / "model.safetensors")
    finally:
        module._BAND = original
    assert (small / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for name, target in (
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
    ):
        values = gguf.dequantize(packed[name], gguf.GGMLQuantizationType[kinds[name]]).reshape(stored[name].shape)
        if name.endswith("attn_q.weight"):
            values = values.reshape(HEADS, 8, 2, 64).swapaxes(1, 2).reshape(values.shape)
        expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(found[target], expected, err_msg=name)


def _rewrite(path: Path, config: dict[str, Any], stored: Weights, packed: Weights, kinds: dict[str, str]) -> None:
    import gguf

    from tests.unit.gguf_files import config_keys, tokenizer_keys

    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: np.ndarray, **rest: Any) -> None:
            kind = gguf.GGMLQuantizationType[kinds[name]] if name in kinds else None
            super().add_tensor(name, packed.get(name, tensor), raw_dtype=kind)

    original, gguf.GGUFWriter = gguf.GGUFWriter, Writer
    try:
        write_file(path, {**config_keys(config), **tokenizer_keys()}, stored)
    finally:
        gguf.GGUFWriter = original


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    keys = {
        "general.name": "Tiny Mistral",
        "general.tags": ["text"],
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "llama.attention.sliding_window": CONTEXT,
        "llama.attention.head_count_kv": [KV_HEADS] * LAYERS,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.attn_factor": 1.0,
        "quantize.imatrix.file": "x.dat",
        "somebody.else": "who made it",
        "tokenizer.ggml.fim_pre_token_id": 5,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    table = {f"blk.{layer}.attn_rot_embd.weight": floats(*SHORT) for layer in range(LAYERS)}
    weights = write_gguf(tmp_path / "tiny.gguf", keys=keys, add={"rope_freqs.weight": floats(1, 1, 1, 1), **table})
    folder = convert(tmp_path / "tiny.gguf")
    assert_equal_weights(stored_weights(folder), weights)
    config = described(ModelConfig.load(folder))
    assert (config.model_type, config.rope.kind, set(config.windows)) == ("llama", "default", {None})
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.5, 20, True)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_every_token_that_ends_an_answer_is_kept(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 4}
    write_gguf(tmp_path / "tiny.gguf", keys=keys)
    assert ModelConfig.load(convert(tmp_path / "tiny.gguf")).eos_token_ids == (1, 3, 4)


@pytest.mark.parametrize(("pre", "text"), [("smollm", "Ġ 12"), ("llama-bpe", "zab")])
def test_text_is_split_as_the_models_own_tokenizer_does(tmp_path: Path, pre: str, text: str) -> None:
    """SmolLM2's makes a token of each digit; Llama 3's needs no merges for a word that is a token."""
    from tokenizers import Tokenizer

    tokens = [*TOKENS, "zab"]
    keys = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.add_bos_token": False,
    }
    write_gguf(tmp_path / "tiny.gguf", tiny_config(vocab_size=len(tokens)), keys=keys)
    tokenizer = Tokenizer.from_file(str(convert(tmp_path / "tiny.gguf") / "tokenizer.json"))
    expected = {"smollm": ["Ġ", "1", "2"], "llama-bpe": ["zab"]}[pre]
    assert tokenizer.encode(text.replace("Ġ", "")).tokens == expected


def test_a_split_model_is_read_whole_by_any_of_its_files(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf", parts=3)
    folder = convert(tmp_path / "tiny-00002-of-00003.gguf")
    assert_equal_weights(stored_weights(folder), weights)
