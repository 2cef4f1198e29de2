"""OLMo 2 and 3: norms only behind attention and MLP, and one over all query heads and one over all key heads at once.

Such a norm is dealt to the ranks as the heads are; its mean of squares is that of all ranks.
"""

from __future__ import annotations

from typing import Any

from tpctl.arch import parts
from tpctl.arch.block import CutBlock
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.mixers import grouped, whole_norms

DEFAULTS: dict[str, Any] = {
    **COMMON,
    "vocab_size": 50304,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "eos_token_id": 50279,
}
NULLABLE = frozenset({"num_key_value_heads"})


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    bias = fields.flag("attention_bias")
    mixer = grouped(
        sizes, "attention with norms over all heads at once", *whole_norms(sizes), qkv_bias=bias, o_bias=bias
    )
    layer = CutBlock(
        mixer,
        (
            mixer,
            parts.norm(sizes, "post_attention_layernorm"),
            parts.gated(sizes, parts.read_activation(fields)),
            parts.norm(sizes, "post_feedforward_layernorm"),
        ),
    )
    return parts.model(sizes, (layer,) * sizes.num_layers)


FAMILY = Family("Olmo2ForCausalLM", DEFAULTS, NULLABLE, describe, runs=False)
