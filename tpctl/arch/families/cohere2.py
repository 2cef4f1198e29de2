"""Command R7B and Command A: attention and MLP side by side, behind one LayerNorm without bias."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import CutBlock
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.mixers import grouped

ARCHITECTURE = "Cohere2ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    bias = fields.flag("attention_bias")
    mixer = grouped(sizes, "attention beside its MLP", qkv_bias=bias, o_bias=bias)
    mlp = parts.gated(sizes, parts.read_activation(fields))
    layer = CutBlock(mixer, (parts.norm(sizes, "input_layernorm"), mixer, mlp))
    return parts.model(sizes, (layer,) * sizes.num_layers)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
    frozenset({"num_key_value_heads", "head_dim"}),
    describe,
    eps="layer_norm_eps",
    runs=False,
)
