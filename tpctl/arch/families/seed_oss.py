"""Seed-OSS: Llama with biases on q, k and v, and another field for that of the output."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "SeedOssForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    qkv_bias, o_bias = fields.flag("attention_bias"), fields.flag("attention_out_bias")
    mlp = parts.gated(sizes, activation, bias=fields.flag("mlp_bias"))
    windows = no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    blocks = (
        parts.block(sizes, parts.attention(sizes, rope, window, qkv_bias=qkv_bias, o_bias=o_bias), mlp)
        for window in windows
    )
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    describe,
)
