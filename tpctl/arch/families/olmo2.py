"""OLMo 2: norms only behind attention and MLP, and one over all query heads and one over all key heads at once.

Such a norm is dealt to the ranks as the heads are; its mean of squares is that of all ranks.
"""

from __future__ import annotations

from typing import Any

from tpctl.arch import parts
from tpctl.arch.block import Attention, Block, Gated
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import RopeConfig, read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "Olmo2ForCausalLM"
DEFAULTS: dict[str, Any] = {
    **COMMON,
    "vocab_size": 50304,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "eos_token_id": 50279,
}
NULLABLE = frozenset({"num_key_value_heads", "sliding_window"})


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    windows = no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    mlp = parts.gated(sizes, parts.read_activation(fields))
    blocks = (block(sizes, attention(fields, sizes, rope, window), mlp) for window in windows)
    return parts.rounded_once(parts.model(sizes, tuple(blocks)))


def attention(fields: Fields, sizes: Sizes, rope: RopeConfig, window: int | None) -> Attention:
    """Attention with norms over all heads at once."""
    bias = fields.flag("attention_bias")
    return parts.attention(sizes, rope, window, qkv_bias=bias, o_bias=bias, whole_norms=True)


def block(sizes: Sizes, attention: Attention, mlp: Gated) -> Block:
    """A block that norms what it adds to the residual, and not what it reads from it."""
    return Block(
        before_attention=None,
        attention=attention,
        after_attention=parts.norm(sizes, "post_attention_layernorm"),
        before_mlp=None,
        mlp=mlp,
        after_mlp=parts.norm(sizes, "post_feedforward_layernorm"),
    )


FAMILY = Family(ARCHITECTURE, DEFAULTS, NULLABLE, describe)
