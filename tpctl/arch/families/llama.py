"""Llama 2 and 3.x, SmolLM2, and everything else published under this type."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "LlamaForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, activation, bias=fields.flag("mlp_bias"))
    windows = no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    blocks = (
        parts.block(sizes, parts.attention(sizes, rope, window, qkv_bias=bias, o_bias=bias), mlp) for window in windows
    )
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    describe,
)
