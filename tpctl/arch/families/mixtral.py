"""Mixtral: Mistral with experts in every layer; softmax over the top few."""

from __future__ import annotations

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, MOST_EXPERTS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.routing import Routing
from tpctl.arch.windows import one_window

ARCHITECTURE = "MixtralForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    count = fields.whole(fields.either("num_local_experts", "num_experts"), most=MOST_EXPERTS)
    experts = mixture.experts(
        sizes.hidden_size,
        sizes.intermediate_size,
        count,
        fields.whole("num_experts_per_tok", most=count),
        where=mixture.SPARSE,
        projections=mixture.MIXTRAL,
        routing=Routing("softmax", renormalise=True),
    )
    parts.read_activation(fields)
    windows = one_window(fields, sizes.num_layers, ARCHITECTURE)
    layers = (parts.block(sizes, parts.attention(sizes, rope, window), experts) for window in windows)
    return parts.model(sizes, tuple(layers))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    frozenset({"head_dim", "sliding_window"}),
    describe,
    frozenset({"num_local_experts", "num_experts", "num_experts_per_tok"}),
)
