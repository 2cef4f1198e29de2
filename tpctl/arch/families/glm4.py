"""GLM-4-0414: norms before and behind attention and MLP, and a RoPE of neighbouring dimensions in half of a head."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import Block
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "Glm4ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim, partial=True, interleaved=True)
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, parts.read_activation(fields), fused=True)
    blocks = (
        Block(
            before_attention=parts.norm(sizes, "input_layernorm"),
            attention=parts.attention(sizes, rope, window, qkv_bias=bias),
            after_attention=parts.norm(sizes, "post_self_attn_layernorm"),
            before_mlp=parts.norm(sizes, "post_attention_layernorm"),
            mlp=mlp,
            after_mlp=parts.norm(sizes, "post_mlp_layernorm"),
        )
        for window in no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    )
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    frozenset({"partial_rotary_factor", "sliding_window"}),
    describe,
    unset=frozenset({"eos_token_id"}),
)
