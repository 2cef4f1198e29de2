"""Tiny random checkpoints of models that see or hear, made with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import (
    FAMILIES,
    GEMMA3,
    GEMMA4,
    GEMMA4_EDGE,
    GEMMA4_MOE,
    MINISTRAL3_ROPE,
    SIZES,
    make_checkpoint,
    save,
)

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
ALONE = ("ministral3", "gemma4-text", "gemma4-text-moe", "gemma4-text-edge", "gemma4-unified-text")
"""Text models without anything beside them."""

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
        {"model_type": "ministral3", "head_dim": 12, "rope_parameters": MINISTRAL3_ROPE},
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


def make_either(name: str, folder: Path) -> Any:
    """One of ``FAMILIES`` or of ``SEEING``."""
    return (make_checkpoint if name in FAMILIES and name not in SEEING else make_seeing)(name, folder)


def make_seeing(name: str, folder: Path) -> Any:
    """Save a random float32 checkpoint of ``SEEING[name]``, towers included; the transformers model."""
    import transformers

    kind, text, fields = SEEING[name]
    config = getattr(transformers, f"{kind}Config")(text_config={**SIZES, **text}, **fields)
    return save(config, f"{kind}ForConditionalGeneration", folder, len(name))
