"""GLM-4.5 to 4.7: dense layers first, then experts chosen by sigmoid and a correction, and shared ones."""

from __future__ import annotations

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "Glm4MoeForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim, partial=True)
    bias, qk_norm = fields.flag("attention_bias"), fields.flag("use_qk_norm")
    no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    attention = parts.attention(sizes, rope, None, qkv_bias=bias, qk_norm=qk_norm)
    return mixture.dense_first(fields, sizes, attention)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 151552,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    frozenset({"sliding_window"}),
    describe,
    frozenset(
        {
            *("n_routed_experts", "num_local_experts", "n_shared_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
            "use_qk_norm",
        }
    ),
)
