"""A GGUF's keys as a transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from tpctl.checkpoint.gguf.header import GgufError, GgufTensor
from tpctl.checkpoint.gguf.metadata import OTHER, Metadata
from tpctl.checkpoint.gguf.rope import rope_parameters


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores one of its architectures.

    Attributes:
        model_type, class_name: transformers' names of it.
        interleaved: the rows of each query and key head alternate between its two halves.
        fused: query, key and value are one tensor, gate and up another.
        qk_norm: each query and key head has a norm.
        qkv_bias: always has biases on query, key and value, and on nothing else.
        sandwich: norms behind attention and MLP as well, and 1 added to the weights of all.
    """

    model_type: str
    class_name: str
    interleaved: bool = False
    fused: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    sandwich: bool = False


ARCHITECTURES = {
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", qk_norm=True, sandwich=True),
    # Mistral's dense models are stored as Llamas, and differ by a sliding window at most.
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", fused=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}

_MISTRAL = ("mistral", "MistralForCausalLM")

_NEUTRAL = {
    ".use_parallel_residual": (0,),
    ".attention.causal": (1,),
    ".pooling_type": (0,),
    ".logit_scale": (0, 1),
    ".residual_scale": (0, 1),
    ".embedding_scale": (0, 1),
    ".attn_logit_softcapping": (0,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".nextn_predict_layers": (0,),
    ".leading_dense_block_count": (0,),
}
"""Settings that none of these architectures has, and the values that change nothing."""

_EXPERTS = (".expert_count", ".expert_used_count")


def architecture(metadata: Metadata) -> Architecture:
    """How the model is stored.

    Raises:
        GgufError: it is no model, or none that tpctl runs.
    """
    kind = metadata.text("general.type", "model")
    if kind == "adapter" or metadata.named("adapter."):
        raise GgufError("it is an adapter (LoRA), not a model; merge it into its base model first")
    if kind != "model":
        raise GgufError(f"it is of the type {kind!r}, not a model; pass the model's file")
    name = metadata.architecture
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise GgufError(f"its architecture {name!r} is not supported; tpctl converts GGUF files of {known}")
    return ARCHITECTURES[name]


def build_config(metadata: Metadata, arch: Architecture, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The config, without the tokenizer's ids.

    Raises:
        GgufError: a setting is missing, impossible, or one that the family does not have.
    """
    experts = next((key for key in _EXPERTS if metadata.integer(key, 0)), None)
    if experts is not None:
        count = f"{metadata.full(experts)} is {metadata.integer(experts)}"
        raise GgufError(f"it is a mixture of experts ({count}), which is not supported; use a dense model")
    for key, values in _NEUTRAL.items():
        metadata.only(key, *values)
    if metadata.text(".tensor_data_layout", _META) != _META:
        raise GgufError(f"its tensors are laid out as {metadata.text('.tensor_data_layout')!r}; {OTHER}")
    hidden, heads = metadata.positive(".embedding_length"), metadata.positive(".attention.head_count")
    head_dim = metadata.positive(".attention.key_length", hidden // heads or 1)
    if not metadata.has(".attention.key_length") and hidden % heads:
        raise GgufError(f"its {hidden} hidden dimensions do not divide among {heads} heads; download it again")
    metadata.only(".attention.value_length", head_dim)
    metadata.only(".attention.scale", 0, 1 / sqrt(head_dim))
    context = metadata.positive(".context_length")
    rotary_dim = metadata.positive(".rope.dimension_count", head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise GgufError(f"{rotary_dim} rotated dimensions do not form pairs within a head of {head_dim}")
    rope = rope_parameters(metadata, tensors, rotary_dim, context)
    config: dict[str, Any] = {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.positive(".feed_forward_length"),
        "num_hidden_layers": metadata.positive(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.positive(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if arch.sandwich:
        del config["hidden_act"]
        return {**config, **_gemma3(metadata, rope, hidden // heads, head_dim, config["num_hidden_layers"])}
    metadata.only(".final_logit_softcapping", 0)
    window = metadata.integer(".attention.sliding_window", None if arch.model_type == "phi3" else 0)
    if arch.model_type == "phi3":
        return {**config, **_phi3(rope, rotary_dim, head_dim, context, window)}
    if rotary_dim != head_dim:
        raise GgufError(
            f"{metadata.full('.rope.dimension_count')} is {rotary_dim} of heads of {head_dim}, and only whole heads "
            f"are rotated in this family; {OTHER}"
        )
    return {**config, **_plain(metadata, arch, tensors, window, context)}


_META = "Meta AI original pth"
"""Old files of Llamas say this; their rows are in the order of all others."""


def _phi3(rope: dict[str, Any], rotary_dim: int, head_dim: int, context: int, window: int) -> dict[str, Any]:
    if rope["rope_type"] not in ("default", "longrope"):
        raise GgufError(f"its RoPE scaling {rope['rope_type']!r} is none that Phi-3 has; {OTHER}")
    factor = rotary_dim / head_dim
    if int(head_dim * factor) != rotary_dim:
        raise GgufError(f"{rotary_dim} rotated dimensions of {head_dim} cannot be said in a config; {OTHER}")
    rope["partial_rotary_factor"] = factor
    return {
        "partial_rotary_factor": factor,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", context),
        "sliding_window": window or None,
    }


def _gemma3(metadata: Metadata, rope: dict[str, Any], share: int, head_dim: int, num_layers: int) -> dict[str, Any]:
    """What llama.cpp knows of Gemma 3 without being told: every sixth layer has no window, and the others rotate by a
    base of their own and by no factor; only the one of 62 layers scales its scores by ``share`` dimensions a head."""
    every = metadata.positive(".attention.sliding_window_pattern", 6)
    local = metadata.number(".rope.freq_base_swa", 10000.0)
    cap = metadata.number(".final_logit_softcapping", 0.0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": share if num_layers == 62 else head_dim,
        "sliding_window": metadata.positive(".attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(num_layers)
        ],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "attention_bias": False,
        "final_logit_softcapping": cap or None,
    }


def _plain(
    metadata: Metadata, arch: Architecture, tensors: Mapping[str, GgufTensor], window: int, context: int
) -> dict[str, Any]:
    attention_bias = any(f"blk.0.attn_{name}.bias" in tensors for name in ("q", "k", "v", "output"))
    mlp_bias = any(f"blk.0.ffn_{name}.bias" in tensors for name in ("gate", "up", "down"))
    windowed = 0 < window < context
    if arch.model_type == "llama" and windowed and not attention_bias and not mlp_bias:
        model_type, class_name = _MISTRAL
        return {"model_type": model_type, "architectures": [class_name], "sliding_window": window}
    if windowed:
        key = metadata.full(".attention.sliding_window")
        raise GgufError(f"{key} is {window}, and which layers it applies to is not said; {OTHER}")
    if arch.model_type == "llama":
        return {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
    bias = {} if arch.qkv_bias else {"attention_bias": attention_bias}
    return {**bias, "use_sliding_window": False, "sliding_window": None}
