"""Tiny GGUF files of every architecture, as llama.cpp's converter would write the models they are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.synthetic import make_config, source_shapes

Keys = dict[str, Any]
Weights = dict[str, np.ndarray]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS, CONTEXT = 32, 4, 2, 8, 48, 2, 64
TOKENS = ["<|im_start|>", "<|im_end|>", *(chr(33 + index) for index in range(90)), "Ġ", "cd", "ab", "0", "12"]
TOKENS = list(dict.fromkeys(TOKENS))
SHORT, LONG = [1.0, 1.1, 1.25, 1.5], [1.0, 2.0, 4.0, 8.0]
"""Divisors of a long RoPE, for short and for long sequences."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def tiny_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": WIDTH,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": CONTEXT,
    }
    return make_config(family, **{**sizes, **changes})


def random_weights(config: Mapping[str, Any]) -> Weights:
    """Weights by their Hugging Face names; values that bfloat16 holds exactly, so that comparisons can be exact."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(-64, 64, shape) / (64 if len(shape) == 1 else 256)).astype(np.float32)
        for name, shape in source_shapes(config).items()
    }


def tokenizer_keys() -> Keys:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": ["a b", "c d", "1 2"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }


def config_keys(config: Mapping[str, Any]) -> Keys:
    """What the converter writes of a config without RoPE scaling."""
    family = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    if family == "phi3":
        own |= {"attention.sliding_window": 0, "rope.scaling.original_context_length": CONTEXT}
    return {"general.architecture": family, **{f"{family}.{key}": value for key, value in own.items()}}


def halves_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a Llama's query or key rows: those of each head's two halves in turn."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def stored_tensors(config: Mapping[str, Any], weights: Weights) -> Weights:
    """``weights`` by their names in a GGUF file, in its order of rows."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    gemma = config["model_type"] == "gemma3_text"
    names, tensors = {**NAMES, **(GEMMA_NAMES if gemma else {})}, {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if gemma and stem.endswith("norm"):
            weight = weight + 1
        if stem in top:
            tensors[f"{top[stem]}.{kind}"] = weight
            continue
        _, _, layer, part = stem.split(".", 3)
        target = names[part]
        if target in heads and config["model_type"] in ("llama", "mistral"):
            weight = halves_interleaved(weight, heads[target])
        tensors[f"blk.{layer}.{target}.{kind}"] = weight
    return tensors


def write_gguf(
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    keys: Mapping[str, Any] | None = None,
    add: Mapping[str, np.ndarray] | None = None,
    drop: Collection[str] = (),
    weights: Weights | None = None,
    parts: int = 1,
) -> Weights:
    """Write the model of ``config`` to ``path``, or to files named after it; returns its weights.

    Args:
        keys: more keys, or others; of one with ``None`` there is none.
        add, drop: tensors by their names in the file.
    """
    config = config or tiny_config()
    weights = random_weights(config) if weights is None else weights
    tensors = {**stored_tensors(config, weights), **(add or {})}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    given = {**config_keys(config), **tokenizer_keys(), **(keys or {})}
    given = {key: value for key, value in given.items() if value is not None}
    if parts == 1:
        write_file(path, given, tensors)
        return weights
    names = sorted(tensors)
    for part in range(parts):
        split = {"split.no": part, "split.count": parts, "split.tensors.count": len(names)}
        held = {name: tensors[name] for name in names[part::parts]}
        file = path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}.gguf")
        write_file(file, {**(given if part == 0 else {}), **split}, held)
    return weights


def write_file(path: Path, keys: Mapping[str, Any], tensors: Weights) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # the architecture is among the keys, where there is one
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
