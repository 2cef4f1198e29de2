"""SmolLM3: Llama without RoPE in every fourth layer."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.mixers import grouped

ARCHITECTURE = "SmolLM3ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    bias = fields.flag("attention_bias")
    mixer = grouped(sizes, "attention without RoPE in some layers", qkv_bias=bias, o_bias=bias)
    mlp = parts.gated(sizes, parts.read_activation(fields), bias=fields.flag("mlp_bias"))
    return parts.model(sizes, (parts.cut_block(sizes, mixer, mlp),) * sizes.num_layers)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    frozenset({"num_key_value_heads"}),
    describe,
    runs=False,
)
