"""Phi-3, 3.5 and 4-mini: merged weights in the source, long RoPE, and heads of which a part is rotated."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import one_window

ARCHITECTURE = "Phi3ForCausalLM"
ROPE_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
"""The last two are what its first releases call long RoPE."""


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim, kinds=ROPE_KINDS, partial=True)
    mlp = parts.gated(sizes, activation, fused=True)
    windows = one_window(fields, sizes.num_layers, ARCHITECTURE)
    blocks = (parts.block(sizes, parts.attention(sizes, rope, window, fused=True), mlp) for window in windows)
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    describe,
)
