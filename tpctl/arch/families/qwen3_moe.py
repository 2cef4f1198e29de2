"""Qwen3 with experts in (most of) its layers: softmax over all, the top few; no shared expert."""

from __future__ import annotations

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import qwen2
from tpctl.arch.family import MOST_EXPERTS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import one_window
from tpctl.errors import UnsupportedModelError

ARCHITECTURE = "Qwen3MoeForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    bias = fields.flag("attention_bias")
    # Published files have the first name, those that transformers 5 writes the second.
    count = fields.whole(fields.either("num_experts", "num_local_experts"), most=MOST_EXPERTS)
    experts = mixture.experts(
        sizes.hidden_size,
        fields.whole("moe_intermediate_size"),
        count,
        fields.whole("num_experts_per_tok", most=count),
        routing=mixture.softmax(fields),
    )
    mlp = parts.gated(sizes, parts.read_activation(fields))
    if not fields.flag("use_qk_norm"):  # no field of its class in transformers, but of Qwen3-Coder's config
        raise UnsupportedModelError(f"config.json: use_qk_norm is false, but {ARCHITECTURE} has norms over its heads")
    windows = one_window(fields, sizes.num_layers, ARCHITECTURE, used=fields.flag("use_sliding_window"))
    attention = parts.attention(sizes, rope, windows[0], qkv_bias=bias, o_bias=bias, qk_norm=True)
    sparse = mixture.sparse_layers(fields, sizes.num_layers)
    return parts.model(sizes, tuple(parts.block(sizes, attention, experts if one else mlp) for one in sparse))


FAMILY = Family(
    ARCHITECTURE,
    {
        **qwen2.DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "use_qk_norm": True,
    },
    frozenset({"mlp_only_layers", "sliding_window"}),
    describe,
    frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "use_qk_norm"}),
)
