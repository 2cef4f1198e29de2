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

UNEVEN: dict[str, Any] = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.3,
    "logits_scaling": 3.0,
}

MINISTRAL3_ROPE: dict[str, Any] = {
    **YARN_ROPE,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""So short that queries grow within the tests' prompts."""

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
    "rope_parameters": {
        "sliding_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.6,
            "factor": 4.0,
        },
    },
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
    "olmo2": ("Olmo2", UNEVEN),
    "olmo2-biases": ("Olmo2", {"num_key_value_heads": 8, "attention_bias": True}),
    "olmo2-copies": ("Olmo2", {"num_key_value_heads": 2, "head_dim": 12}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 9}),
    "olmo3-yarn": (
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                "full_attention": {**YARN_ROPE, "truncate": False, "attention_factor": 1.1},
            },
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "smollm3-biases": (
        "SmolLM3",
        {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 0], "rope_parameters": YARN_ROPE},
    ),
    "smollm3-window": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 9, "logit_scale": 1.5}),
    "cohere2-biases": (
        "Cohere2",
        {**UNEVEN, "attention_bias": True, "sliding_window": 9, "sliding_window_pattern": 2, "logit_scale": 0.4},
    ),
    "glm4": ("Glm4", {"num_key_value_heads": 2, "head_dim": 16}),
    "glm4-whole-heads": ("Glm4", {"head_dim": 12, "attention_bias": False, "partial_rotary_factor": 1.0}),
    "granite": ("Granite", GRANITE),
    "granite-biases": (
        "Granite",
        {**GRANITE, **UNEVEN, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "ministral3": ("Ministral3", {"head_dim": 12, "rope_parameters": MINISTRAL3_ROPE}),
    "ministral3-window": (
        "Ministral3",
        {
            "head_dim": 8,
            "sliding_window": 9,
            "num_key_value_heads": 2,
            "rope_parameters": MINISTRAL3_ROPE | {"mscale": 0.5},
        },
    ),
    "gemma4-text": ("Gemma4", {**GEMMA4, "attention_bias": True, "final_logit_softcapping": 3.0}),
    "gemma4-text-moe": ("Gemma4", {**GEMMA4_MOE, "tie_word_embeddings": False}),
    "gemma4-text-edge": ("Gemma4", GEMMA4_EDGE),
    "gemma4-unified-text": ("Gemma4Unified", GEMMA4),
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

HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
GATED_DELTA_NET: dict[str, Any] = {
    **HEADS,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
FEW: dict[str, Any] = {"num_experts": 6, "moe_intermediate_size": 23, "num_experts_per_tok": 3}
SHARED: dict[str, Any] = {**FEW, "shared_expert_intermediate_size": 29}
CORRECTED: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 23,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    **CORRECTED,
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 2,
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**HEADS, "num_local_experts": 6, "intermediate_size": 23}),
    "qwen2_moe": ("Qwen2Moe", {**SHARED, **HEADS, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe": ("Qwen3Moe", {**FEW, **HEADS, "decoder_sparse_step": 2, "attention_bias": True}),
    "qwen3_next": (
        "Qwen3Next",
        {**GATED_DELTA_NET, **SHARED, "linear_num_key_heads": 6, "linear_num_value_heads": 12},
    ),
    "qwen3_5_text": (
        "Qwen3_5Text",
        {**GATED_DELTA_NET, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        {**GATED_DELTA_NET, **SHARED, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    ),
    "gpt_oss": ("GptOss", {**HEADS, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 23}),
    "glm4_moe": ("Glm4Moe", {**CORRECTED, "head_dim": 8, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe-plain": ("Glm4Moe", {**CORRECTED, "head_dim": 8, "first_k_dense_replace": 0}),
    "minimax_m2": ("MiniMaxM2", {**HEADS, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 23}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "attention_bias": True}),
    "deepseek_v3-no-q-rank": ("DeepseekV3", {**LATENT, "q_lora_rank": None, "rms_norm_eps": 1e-3}),
}
"""Mixtures of experts, and what is beside them in models that tpctl cuts and does not run."""


def make_mixture(name: str, folder: Path, *, stacked: bool = False, sees: bool = False, **changes: Any) -> Any:
    """Save a random float32 checkpoint of ``MIXTURES[name]`` in ``folder``; the transformers model, in eval mode.

    Args:
        stacked: as transformers holds it, the experts stacked; otherwise as it is published.
        sees: of the class that also sees, with the text model inside of it.
    """
    import transformers

    kind, overrides = MIXTURES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **overrides, **changes})
    kind, task = kind.removesuffix("Text"), "CausalLM"
    if sees:
        outer = getattr(transformers, f"{kind}Config")
        config = outer(
            text_config=config.to_dict(), vision_config=VISION, tie_word_embeddings=config.tie_word_embeddings
        )
        task = "ConditionalGeneration"
    torch.manual_seed(len(name))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the others want rows of whole 16 bytes
    model = getattr(transformers, f"{kind}For{task}")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else parameter.normal_(0.5, 0.3)
        for key, buffer in model.named_buffers():
            if "correction" in key:
                buffer.normal_(0.0, 0.3)
    model.save_pretrained(folder, save_original_format=not stacked)
    return model


def save(config: Any, model_class: str, folder: Path, seed: int) -> Any:
    """Save a random float32 checkpoint of that class in ``folder``; the model, in eval mode."""
    import transformers

    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that a wrong mask, table or bias moves the logits visibly.
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else parameter.normal_(0.5, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def make_checkpoint(name: str, folder: Path, **changes: Any) -> Any:
    """Save a random float32 checkpoint of ``FAMILIES[name]`` in ``folder``; the transformers model, in eval mode."""
    import transformers

    kind, overrides = FAMILIES[name]
    config = getattr(transformers, f"{kind}{'Text' if kind[:6] in ('Gemma3', 'Gemma4') else ''}Config")(
        **{**SIZES, **overrides, **changes}
    )
    return save(config, f"{kind}ForCausalLM", folder, len(name))


def make_broken(name: str, folder: Path, token: int, *, sampled: bool = False, **changes: Any) -> None:
    """The same, but for the embedding of ``token``, which is NaN: prompts that hold it have no finite logits. Unless
    it is to be ``sampled`` its own logit is 0, so that it seldom is."""
    model = make_checkpoint(name, folder, **{"tie_word_embeddings": False, **changes})
    model.model.embed_tokens.weight.data[token] = float("nan")
    if not sampled:
        model.lm_head.weight.data[token] = 0.0
    model.save_pretrained(folder)
