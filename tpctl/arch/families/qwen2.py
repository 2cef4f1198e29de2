"""Qwen2 and 2.5: biases on q, k and v alone, and a window that the config may switch on for the upper layers."""

from __future__ import annotations

from typing import Any

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import upper_windows

ARCHITECTURE = "Qwen2ForCausalLM"
DEFAULTS: dict[str, Any] = {
    **COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    mlp = parts.gated(sizes, activation)
    windows = upper_windows(fields, sizes.num_layers)
    blocks = (parts.block(sizes, parts.attention(sizes, rope, window, qkv_bias=True), mlp) for window in windows)
    return parts.model(sizes, tuple(blocks))


FAMILY = Family(
    ARCHITECTURE,
    DEFAULTS,
    frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    describe,
)
