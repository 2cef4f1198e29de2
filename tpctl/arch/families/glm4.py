"""GLM-4-0414: norms before and behind attention and MLP, and a RoPE of neighbouring dimensions in half of a head."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import CutBlock
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.mixers import grouped

ARCHITECTURE = "Glm4ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    mixer = grouped(sizes, "attention that rotates neighbouring dimensions", qkv_bias=fields.flag("attention_bias"))
    layer = CutBlock(
        mixer,
        (
            parts.norm(sizes, "input_layernorm"),
            mixer,
            parts.norm(sizes, "post_self_attn_layernorm"),
            parts.norm(sizes, "post_attention_layernorm"),
            parts.gated(sizes, parts.read_activation(fields), fused=True),
            parts.norm(sizes, "post_mlp_layernorm"),
        ),
    )
    return parts.model(sizes, (layer,) * sizes.num_layers)


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
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    frozenset(),
    describe,
    runs=False,
)
