"""Granite 3: Llama with factors at the embedding, the scores, the residuals and the logits."""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "GraniteForCausalLM"
FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    embedding, scores, residual, logits = (fields.number(name, least=1e-6, most=1e6) for name in FACTORS)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, parts.read_activation(fields), bias=fields.flag("mlp_bias"))
    attentions = (
        parts.attention(sizes, rope, window, qkv_bias=bias, o_bias=bias, scale=scores)
        for window in no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    )
    blocks = (replace(parts.block(sizes, one, mlp), residual_scale=residual) for one in attentions)
    return replace(parts.model(sizes, tuple(blocks)), embedding_scale=embedding, logit_scale=1 / logits)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        **dict.fromkeys(FACTORS, 1.0),
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    frozenset({"num_key_value_heads", "sliding_window"}),
    describe,
    own=frozenset(FACTORS),
)
