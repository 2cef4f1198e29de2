"""Tiny random checkpoints of every supported family, made with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _long_rope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.5 * i for i in range(pairs)],
        "original_max_position_embeddings": 24,
    }


LONG_ROPES = {pairs: _long_rope(pairs) for pairs in (3, 4, 8, 12, 24, 32)}
"""By half the rotated dimensions of a head."""

GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "tie_word_embeddings": True,
}

GEMMA2: dict[str, Any] = {"head_dim": 12, "sliding_window": 9, "tie_word_embeddings": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 8}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "smollm2": (
        "Llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "gemma2": ("Gemma2", {**GEMMA2, "query_pre_attn_scalar": 5}),
    "gemma2-caps": (
        "Gemma2",
        {**GEMMA2, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "attention_bias": True},
    ),
    "seed-oss": ("SeedOss", {"head_dim": 12}),
    "seed-oss-biases": ("SeedOss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3-caps": (
        "Gemma3",
        {
            **GEMMA3,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "query_pre_attn_scalar": 5,
            "rope_parameters": None,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-window": ("Phi3", {"sliding_window": 11}),
    "phi3-long-rope": (
        "Phi3",
        {"rope_parameters": LONG_ROPES[4], "original_max_position_embeddings": 24, "sliding_window": None},
    ),
    "phi4-mini": (
        "Phi3",
        {
            "rope_parameters": LONG_ROPES[3] | {"partial_rotary_factor": 0.75},
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 24,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
}

PIXTRAL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4_TOWER: dict[str, Any] = {
    **{key: value for key, value in PIXTRAL.items() if key not in ("image_size", "patch_size")},
    "num_key_value_heads": 2,
    "position_embedding_size": 32,
}
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 8,
    "global_head_dim": 12,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 0,
}
GEMMA4_MOE: dict[str, Any] = {
    **GEMMA4,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 28,
}
GEMMA4_EDGE: dict[str, Any] = {
    **GEMMA4,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 140,
}
UNEVEN: dict[str, Any] = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}

CUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cohere2": ("Cohere2", "Cohere2ForCausalLM", {"tie_word_embeddings": True}),
    "cohere2-biases": ("Cohere2", "Cohere2ForCausalLM", {**UNEVEN, "attention_bias": True}),
    "glm4": ("Glm4", "Glm4ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "granite": ("Granite", "GraniteForCausalLM", {"residual_multiplier": 0.2, "logits_scaling": 8.0}),
    "granite-biases": ("Granite", "GraniteForCausalLM", {**UNEVEN, "attention_bias": True, "mlp_bias": True}),
    "ministral3": ("Ministral3", "Ministral3ForCausalLM", {"head_dim": 12}),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", UNEVEN),
    "olmo2-biases": ("Olmo2", "Olmo2ForCausalLM", {"num_key_value_heads": 8, "attention_bias": True}),
    "olmo3": ("Olmo3", "Olmo3ForCausalLM", {"num_hidden_layers": 4}),
    "smollm3": ("SmolLM3", "SmolLM3ForCausalLM", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "smollm3-biases": ("SmolLM3", "SmolLM3ForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "gemma4-text": ("Gemma4Text", "Gemma4ForCausalLM", {**GEMMA4, "attention_bias": True}),
    "gemma4-text-moe": ("Gemma4Text", "Gemma4ForCausalLM", {**GEMMA4_MOE, "tie_word_embeddings": False}),
    "gemma4-text-edge": ("Gemma4Text", "Gemma4ForCausalLM", GEMMA4_EDGE),
    "gemma4-unified-text": ("Gemma4UnifiedText", "Gemma4UnifiedForCausalLM", GEMMA4),
}
"""Families that are cut and not run: class of the config, class of the model, fields."""

SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", GEMMA3, {"vision_config": PIXTRAL}),
    "gemma3-untied": ("Gemma3", GEMMA3, {"vision_config": PIXTRAL, "tie_word_embeddings": False}),
    "mistral3": ("Mistral3", {"model_type": "mistral", "sliding_window": None}, {"vision_config": PIXTRAL}),
    "mistral3-untied": (
        "Mistral3",
        {"model_type": "mistral", "sliding_window": 7},
        {"vision_config": PIXTRAL, "tie_word_embeddings": False},
    ),
    "mistral3-ministral": (
        "Mistral3",
        {"model_type": "ministral3", "head_dim": 12},
        {"vision_config": PIXTRAL, "tie_word_embeddings": False},
    ),
    "gemma4-dense": ("Gemma4", {**GEMMA4, "attention_k_eq_v": True}, {"vision_config": GEMMA4_TOWER}),
    "gemma4-moe": ("Gemma4", GEMMA4_MOE, {"vision_config": GEMMA4_TOWER}),
    "gemma4-edge": (
        "Gemma4",
        GEMMA4_EDGE,
        {
            "vision_config": GEMMA4_TOWER,
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "output_proj_dims": 16,
                "subsampling_conv_channels": [4, 4],
            },
        },
    ),
    "gemma4-unified": (
        "Gemma4Unified",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {
            "vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16},
            "audio_config": {"audio_embed_dim": 16},
        },
    ),
}
"""Models that see or hear: prefix of their classes, fields of their text model, other fields."""


def make_cut(name: str, folder: Path, **changes: Any) -> Any:
    """Save a random float32 checkpoint of ``CUT[name]`` in ``folder``; the transformers model."""
    import transformers

    config, model, fields = CUT[name]
    return _save(getattr(transformers, f"{config}Config")(**{**SIZES, **fields, **changes}), model, folder, len(name))


def make_seeing(name: str, folder: Path) -> Any:
    """The same of ``SEEING[name]``, with its towers."""
    import transformers

    kind, text, fields = SEEING[name]
    config = getattr(transformers, f"{kind}Config")(text_config={**SIZES, **text}, **fields)
    return _save(config, f"{kind}ForConditionalGeneration", folder, len(name))


def _save(config: Any, model_class: str, folder: Path, seed: int) -> Any:
    import transformers

    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that a wrong mask, table or bias moves the logits visibly.
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else parameter.normal_(0.5, 0.3)
    model.save_pretrained(folder)
    return model


def make_checkpoint(name: str, folder: Path, **changes: Any) -> Any:
    """Save a random float32 checkpoint of ``FAMILIES[name]`` in ``folder``; the transformers model, in eval mode."""
    import transformers

    kind, overrides = FAMILIES[name]
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(
        **{**SIZES, **overrides, **changes}
    )
    return _save(config, f"{kind}ForCausalLM", folder, len(name))


def make_broken(name: str, folder: Path, token: int, *, sampled: bool = False, **changes: Any) -> None:
    """The same, but for the embedding of ``token``, which is NaN: prompts that hold it have no finite logits. Unless
    it is to be ``sampled`` its own logit is 0, so that it seldom is."""
    model = make_checkpoint(name, folder, **{"tie_word_embeddings": False, **changes})
    model.model.embed_tokens.weight.data[token] = float("nan")
    if not sampled:
        model.lm_head.weight.data[token] = 0.0
    model.save_pretrained(folder)
