"""The supported model families, as data.

A ``FamilySpec`` says what a family's weights look like and which optional parts its decoder has. What a single
checkpoint may vary (sizes, biases that the config switches) is read from its ``config.json`` by ``models.config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROPE_KINDS = frozenset({"default", "linear", "llama3", "yarn", "longrope"})

MOST_POSITIONS = 2**25
"""Longest sequence that a config may promise; the longest that is published has 10^7 tokens."""

MOST_LAYERS, MOST_HEADS = 10_000, 4096


@dataclass(frozen=True)
class FamilySpec:
    """What one ``model_type`` needs.

    Attributes:
        architecture: the class name that ``config.json`` lists under ``architectures``.
        qkv_bias, o_bias, mlp_bias: ``True``/``False``, or the name of the config field that decides.
        qk_norm: RMSNorm over each query and key head before RoPE.
        fused: the source stores ``qkv_proj`` and ``gate_up_proj`` as one tensor each.
        window: how a sliding window is configured: ``"none"``, ``"always"`` (``sliding_window`` applies to every
            layer where it is set) or ``"layers"`` (``use_sliding_window`` and ``max_window_layers``).
        partial_rotary: honours ``partial_rotary_factor``.
        rope_kinds, rope_names: the RoPE kinds that its configuration class takes, and those it knows by another name.
        defaults: what fields mean that a config does not have: those of the configuration class in transformers 5.
        nullable: fields whose ``null`` that class takes for "none".
    """

    architecture: str
    defaults: Mapping[str, Any]
    nullable: frozenset[str]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    fused: bool = False
    window: str = "none"
    partial_rotary: bool = False
    rope_kinds: frozenset[str] = ROPE_KINDS
    rope_names: Mapping[str, str] = field(default_factory=dict)


_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, FamilySpec] = {
    # Llama 2 and 3.x, SmolLM2, and everything else published under this type.
    "llama": FamilySpec(
        "LlamaForCausalLM",
        {
            **_COMMON,
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": FamilySpec(
        "MistralForCausalLM",
        {
            **_COMMON,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        frozenset({"head_dim", "sliding_window"}),
        window="always",
    ),
    # Qwen2 and 2.5: biases on q, k and v alone.
    "qwen2": FamilySpec(
        "Qwen2ForCausalLM",
        _QWEN,
        frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
        qkv_bias=True,
        window="layers",
    ),
    "qwen3": FamilySpec(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128, "attention_bias": False},
        frozenset({"num_key_value_heads", "sliding_window"}),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        window="layers",
    ),
    # Phi-3, 3.5 and 4-mini.
    "phi3": FamilySpec(
        "Phi3ForCausalLM",
        {
            **_COMMON,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
        fused=True,
        window="always",
        partial_rotary=True,
        rope_kinds=frozenset({"default", "longrope"}),
        rope_names={"su": "longrope", "yarn": "longrope"},  # of its first releases
    ),
}

ACTIVATIONS = frozenset({"silu", "swish"})
