"""Qwen3: a norm over each query and key head in place of Qwen2's biases."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import qwen2
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import upper_windows

ARCHITECTURE = "Qwen3ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, activation)
    blocks = (
        parts.block(sizes, parts.attention(sizes, rope, window, qkv_bias=bias, o_bias=bias, qk_norm=True), mlp)
        for window in upper_windows(fields, sizes.num_layers)
    )
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False},
    frozenset({"num_key_value_heads", "sliding_window"}),
    describe,
)
