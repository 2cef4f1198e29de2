"""The supported model families, as data.

A ``FamilySpec`` says what a family's weights look like and which optional parts its decoder has. What a single
checkpoint may vary (sizes, biases that the config switches) is read from its ``config.json`` by ``models.config``.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        rms_norm_eps: what a config that names none means.
    """

    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    fused: bool = False
    window: str = "none"
    partial_rotary: bool = False
    rms_norm_eps: float = 1e-6


FAMILIES: dict[str, FamilySpec] = {
    # Llama 2 and 3.x, SmolLM2, and everything else published under this type.
    "llama": FamilySpec("LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": FamilySpec("MistralForCausalLM", window="always"),
    # Qwen2 and 2.5: biases on q, k and v alone.
    "qwen2": FamilySpec("Qwen2ForCausalLM", qkv_bias=True, window="layers"),
    "qwen3": FamilySpec(
        "Qwen3ForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="layers"
    ),
    # Phi-3, 3.5 and 4-mini.
    "phi3": FamilySpec("Phi3ForCausalLM", fused=True, window="always", partial_rotary=True, rms_norm_eps=1e-5),
}

ACTIVATIONS = frozenset({"silu", "swish"})
ROPE_KINDS = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's dtype names that a model can be run in, and their names in safetensors headers."""
