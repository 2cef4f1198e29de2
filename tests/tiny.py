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


def make_checkpoint(name: str, folder: Path, **changes: Any) -> Any:
    """Save a random float32 checkpoint of ``FAMILIES[name]`` in ``folder``; the transformers model, in eval mode."""
    import transformers

    kind, overrides = FAMILIES[name]
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(
        **{**SIZES, **overrides, **changes}
    )
    config._attn_implementation = "eager"
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that a wrong mask, table or bias moves the logits visibly.
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else parameter.normal_(0.5, 0.3)
    model.save_pretrained(folder)
    return model


def make_broken(name: str, folder: Path, token: int, *, sampled: bool = False, **changes: Any) -> None:
    """The same, but for the embedding of ``token``, which is NaN: prompts that hold it have no finite logits. Unless
    it is to be ``sampled`` its own logit is 0, so that it seldom is."""
    model = make_checkpoint(name, folder, **{"tie_word_embeddings": False, **changes})
    model.model.embed_tokens.weight.data[token] = float("nan")
    if not sampled:
        model.lm_head.weight.data[token] = 0.0
    model.save_pretrained(folder)
