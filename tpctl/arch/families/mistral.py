"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import one_window

ARCHITECTURE = "MistralForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    mlp = parts.gated(sizes, activation)
    windows = one_window(fields, sizes.num_layers, ARCHITECTURE)
    blocks = (parts.block(sizes, parts.attention(sizes, rope, window), mlp) for window in windows)
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    frozenset({"head_dim", "sliding_window"}),
    describe,
)
