"""MiniMax-M2: experts chosen by sigmoid and a correction, and norms over all query and all key heads at once."""

from __future__ import annotations

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, MOST_EXPERTS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.mixers import grouped, whole_norms

ARCHITECTURE = "MiniMaxM2ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    attention = grouped(sizes, "attention with norms over all heads at once", *whole_norms(sizes))
    count = fields.whole(fields.either("num_local_experts", "num_experts"), most=MOST_EXPERTS)
    experts = mixture.experts(
        sizes.hidden_size,
        sizes.intermediate_size,
        count,
        fields.whole("num_experts_per_tok", most=count),
        where=mixture.SPARSE,
        projections=mixture.MIXTRAL,
        correction="e_score_correction_bias",
    )
    return parts.model(sizes, (parts.cut_block(sizes, attention, experts),) * sizes.num_layers)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    },
    frozenset(),
    describe,
    runs=False,
)
