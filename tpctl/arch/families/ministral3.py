"""Ministral 3: Mistral with queries that are scaled by their position."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields

ARCHITECTURE = "Ministral3ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    kind = "attention that scales queries by their position"
    mixer = Mixer(kind, parts.projections(sizes), sizes.num_heads, sizes.num_kv_heads, kept=2 * sizes.head_dim)
    mlp = parts.gated(sizes, parts.read_activation(fields))
    return parts.model(sizes, (parts.cut_block(sizes, mixer, mlp),) * sizes.num_layers)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    frozenset(),
    describe,
    runs=False,
)
