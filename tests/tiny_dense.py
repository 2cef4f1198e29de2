"""Tiny random checkpoints of Gemma 4, Ministral 3 and models that see, made with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import GEMMA3, SIZES, save

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
    "global_head_dim": 16,
    "sliding_window": 9,
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

CUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ministral3": ("Ministral3", "Ministral3ForCausalLM", {"head_dim": 12}),
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
    return save(getattr(transformers, f"{config}Config")(**{**SIZES, **fields, **changes}), model, folder, len(name))


def make_seeing(name: str, folder: Path) -> Any:
    """The same of ``SEEING[name]``, with its towers."""
    import transformers

    kind, text, fields = SEEING[name]
    config = getattr(transformers, f"{kind}Config")(text_config={**SIZES, **text}, **fields)
    return save(config, f"{kind}ForConditionalGeneration", folder, len(name))
