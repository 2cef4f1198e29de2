"""Granite 3: Llama with factors at the embedding, the scores, the residuals and the logits."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.mixers import grouped

ARCHITECTURE = "GraniteForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    bias = fields.flag("attention_bias")
    mixer = grouped(sizes, "attention in residuals with a factor", qkv_bias=bias, o_bias=bias)
    mlp = parts.gated(sizes, parts.read_activation(fields), bias=fields.flag("mlp_bias"))
    return parts.model(sizes, (parts.cut_block(sizes, mixer, mlp),) * sizes.num_layers)


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
    frozenset({"num_key_value_heads"}),
    describe,
    runs=False,
)
