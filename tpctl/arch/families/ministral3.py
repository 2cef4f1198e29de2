"""Ministral 3: Mistral with queries that are scaled by their position, as Llama 4's are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import RopeConfig, read_rope
from tpctl.arch.windows import one_window
from tpctl.errors import CheckpointError

ARCHITECTURE = "Ministral3ForCausalLM"
BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"
ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    LENGTH: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    BETA: 0.1,
}
"""Where a config has none."""


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = _rope(fields, sizes.head_dim)
    mlp = parts.gated(sizes, parts.read_activation(fields))
    windows = one_window(fields, sizes.num_layers, ARCHITECTURE)
    blocks = (parts.block(sizes, parts.attention(sizes, rope, window), mlp) for window in windows)
    return parts.model(sizes, tuple(blocks))


def _rope(fields: Fields, head_dim: int) -> RopeConfig:
    """RoPE, and by how much queries grow: both of its settings are needed."""
    if not fields.mapping("rope_parameters") and not fields.mapping("rope_scaling"):
        fields = replace(fields, values={**fields.values, "rope_parameters": ROPE})
    rope = read_rope(fields, ARCHITECTURE, head_dim, unread=(BETA, "max_position_embeddings"))
    params = fields.within(fields.mapping("rope_parameters") or fields.mapping("rope_scaling"))
    beta = params.number(BETA, least=0, most=1e6)
    if LENGTH not in params and rope.original_max_position_embeddings == rope.max_position_embeddings:
        raise CheckpointError(f"config.json: the RoPE settings have no {LENGTH}, by which queries are scaled")
    length = params.whole(LENGTH) if LENGTH in params else rope.original_max_position_embeddings
    return replace(rope, growth=(beta, length))


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
    frozenset({"head_dim", "sliding_window"}),
    describe,
)
