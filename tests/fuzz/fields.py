"""Entries of each file that matter to tpctl, each with values that are right, half right, or wrong in a likely way."""

from __future__ import annotations

from typing import Any

from tpctl.arch.families import FAMILIES

Fields = dict[str, list[Any]]

FILE_NAMES = [
    "",
    ".",
    "..",
    "../model/model.safetensors",
    "/etc/passwd",
    "config.json",
    "absent.safetensors",
    "a\x00b",
    "\x1b[31m",
    "x" * 300,
]
WEIGHT_MAPS: list[Any] = [
    {},
    [],
    None,
    {"a": 1},
    {"a": None},
    {"a": "b"},
    {"": ""},
    {"lm_head.weight": "model.safetensors"},
    {1: 2},
]

_ROPES: list[Any] = [
    None,
    {},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "linear"},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 5000.0},
    {"rope_theta": 20000.0},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"type": "dynamic", "factor": 2.0},
    {"factor": 2.0},
    {"type": "default", "rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.2,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 3,
        "long_factor": [2.0] * 3,
        "original_max_position_embeddings": 64,
    },
    {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3},
    {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 3},
    {"rope_type": "mrope", "mrope_section": [1, 1, 1]},
    {"full_attention": {"rope_type": "default"}},
]

_CONFIG: Fields = {
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "phi3", "bloom", "mixtral", "Llama", None],
    "architectures": [
        None,
        [],
        ["LlamaForCausalLM"],
        ["MistralForCausalLM", "X"],
        ["LlamaForSequenceClassification"],
        "LlamaForCausalLM",
    ],
    "hidden_size": [24, 48, 25, 23, 2**31 - 1],
    "num_hidden_layers": [1, 2, 3, 2**31 - 1, 10_000],
    "num_attention_heads": [4, 2, 8, 3, 1, 2**31 - 1],
    "num_key_value_heads": [None, 1, 2, 4, 3, 8, 0],
    "head_dim": [None, 6, 8, 0, 5, 2**31 - 1],
    "intermediate_size": [40, 41, 2**31 - 1],
    "vocab_size": [264, 263, 1, 2**31 - 1],
    "hidden_act": ["silu", "swish", "gelu", "relu", None],
    "rms_norm_eps": [None, 1e-6, 1e-5, 1, 0, 1e18, -1e-5],
    "layer_norm_eps": [1e-3],
    "rope_theta": [None, 10000, 10000.0, 500000.0, 0, -1, 1e-3, 1e300],
    "rope_scaling": _ROPES,
    "rope_parameters": _ROPES,
    "partial_rotary_factor": [None, 1.0, 0.5, 0.75, 0.7, 0.0, 1, 2.0],
    "max_position_embeddings": [None, 1, 128, 64, 2048, 2**31 - 1],
    "original_max_position_embeddings": [None, 32, 64, 0],
    "sliding_window": [None, 1, 4, 4096, 0, -1],
    "use_sliding_window": [None, True, False, 1],
    "max_window_layers": [None, 0, 1, 2, 28, -1, True],
    "layer_types": [
        None,
        [],
        ["full_attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["chunked_attention"] * 2,
        ["full_attention"],
    ],
    "attention_bias": [None, True, False, 1, "false"],
    "mlp_bias": [None, True, False],
    "tie_word_embeddings": [None, True, False, "true", 0],
    "torch_dtype": [None, "float32", "bfloat16", "float16", "torch.bfloat16", "float64", "auto", "int8"],
    "dtype": [None, "float32", "bfloat16", "float16", "torch.float16", ""],
    "eos_token_id": [None, 0, 2, [2, 3], [], -1, 10**9, [256, 256], "2", 2.0],
    "bos_token_id": [None, 1, -1, [1], 10**9],
    "pad_token_id": [None, 0, -1, 10**9],
    "quantization_config": [None, {}, {"quant_method": "awq"}, {"bits": 4}, "gptq", []],
    "compression_config": [None, {}, {"format": "pack-quantized"}],
    "text_config": [{}, {"hidden_size": 8}],
    "attention_dropout": [0.5],
    "pretraining_tp": [2],
    "auto_map": [{"AutoConfig": "x.py--Y"}],
    "is_encoder_decoder": [True],
    "initializer_range": ["x"],
    "use_cache": [0],
}


def config(base: str) -> Fields:
    """The entries of a ``config.json`` of a family; those that it must have anyway are changed less often."""
    assert base in FAMILIES
    return _CONFIG


GENERATION: Fields = {
    "eos_token_id": [None, 2, [256], [256, 2], [], -1, 10**9, "2", [None], 2.5, [True]],
    "bos_token_id": [None, 1, -1],
    "temperature": [0, 0.0, 0.6, 1, 1.0, 2.0, -0.1, 1e300, None, "0.6", True],
    "top_p": [0, 0.5, 1.0, 1.5, -1, None, "1"],
    "top_k": [0, 1, 50, -1, 2.0, 2.5, None, 10**9],
    "min_p": [0, 0.1, 1.0, 2],
    "repetition_penalty": [1.0, 1.1, 0, -1, 1e300],
    "do_sample": [True, False, None, 0, "false"],
    "max_length": [1, 20, -1],
    "max_new_tokens": [1, 20, -1],
    "_from_model_config": [True],
}

LENGTHS = [0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
METADATA: list[Any] = [
    None,
    {},
    {"format": "pt"},
    {"format": "tf"},
    {"a": 1},
    {"a": None},
    [],
    "pt",
    {"\x1b[31m": "\x1b[31m"},
    {"x": "y" * 100_000},
]
TENSORS: dict[str, list[Any]] = {
    "dtype": [
        "BF16",
        "F16",
        "F32",
        "F64",
        "I8",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F4",
        "F99",
        "",
        None,
        16,
        "bf16",
        "C64",
        "\x1b[31m",
    ],
    "shape": [
        [],
        [0],
        [24],
        [24, 24],
        [1, 24, 24],
        [48, 12],
        [-1, -24],
        [2**63, 2],
        [2**32, 2**32],
        [24.0, 24],
        None,
        "24",
        [[24]],
        [True, 24],
        [1] * 10_000,
    ],
    "data_offsets": [
        [0, 0],
        [0, 1],
        [0, 2**63],
        [2**64, 2**64],
        [-2, 0],
        [0],
        [],
        None,
        [0, 0, 0],
        [0.0, 48.0],
        ["0", "48"],
        [True, 48],
    ],
}

SHARD_FILES = [
    "tpctl.json",
    "model-rank-0-part-0.safetensors",
    "model-rank-1-part-0.safetensors",
    "config.json",
    "tokenizer.json",
]
_DIGEST = "0" * 64
MANIFEST: Fields = {
    "format_version": [1, 2, 0, -1, 99, "1", 1.0, True, None],
    "digest": ["blake3", "sha256", "", None],
    "model_type": ["llama", "qwen2", "mistral", "bloom", "", "\x1b[31mllama"],
    "tp_size": [1, 2, 3, 4, 5, 100, 10**9, 2**63, 0, -1, 2.0, "2", True],
    "dtype": [None, "F32", "BF16", "F16", "F99", "U8", "bfloat16", ""],
    "max_part_size": [1, 100, 10**18, 0, 5_000_000_000],
    "compat": [None, "vllm", "sglang", "x", ""],
    "source": [{}, [], {"id": "x"}],
    "files": [
        {},
        [],
        {"config.json": {"size": 1, "digest": _DIGEST}},
        {"../x": {"size": 0, "digest": _DIGEST}},
        {"tpctl.json": {"size": 0, "digest": _DIGEST}},
    ],
    "shards": [
        {},
        [],
        {"5": {}},
        {"0": {"parts": [], "tensors": {}}},
        {"0": {"parts": [], "tensors": {}}, "1": {"parts": [], "tensors": {}}},
        {"-1": {}},
        {"٣": {}},
    ],
    "extra": [None, {}, {"parts": [], "tensors": {}}],
    "expert_parallel": [0, 1, 2, 3, 10**9, 2**63, -1, True, "2", None],
    "even": [True, False, "yes", 1, None],
}
