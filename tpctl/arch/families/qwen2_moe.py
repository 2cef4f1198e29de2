"""Qwen1.5 and 2 with experts: softmax over all, the top few, and a shared expert that a gate weighs."""

from __future__ import annotations

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import qwen2
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope

ARCHITECTURE = "Qwen2MoeForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    experts, mlp = mixture.weighed(fields, sizes), parts.gated(sizes, parts.read_activation(fields))
    attention = parts.attention(sizes, rope, None, qkv_bias=fields.flag("qkv_bias"))
    sparse = mixture.sparse_layers(fields, sizes.num_layers)
    return parts.model(sizes, tuple(parts.cut_block(sizes, attention, experts if one else mlp) for one in sparse))


FAMILY = Family(
    ARCHITECTURE,
    {
        **qwen2.DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "mlp_only_layers": [],
    },
    frozenset({"mlp_only_layers"}),
    describe,
    runs=False,
)
