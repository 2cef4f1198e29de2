"""Qwen1.5 and 2 with experts: softmax over all, the top few, and a shared expert that a gate weighs."""

from __future__ import annotations

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import qwen2
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import Windows, layer_kinds, upper_windows

ARCHITECTURE = "Qwen2MoeForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    experts, mlp = (
        mixture.weighed(fields, sizes, mixture.softmax(fields)),
        parts.gated(sizes, parts.read_activation(fields)),
    )
    bias = fields.flag("qkv_bias")
    sparse = mixture.sparse_layers(fields, sizes.num_layers)
    windows = _windows(fields, sizes.num_layers)
    layers = (
        parts.block(sizes, parts.attention(sizes, rope, window, qkv_bias=bias), experts if one else mlp)
        for one, window in zip(sparse, windows, strict=True)
    )
    return parts.model(sizes, tuple(layers))


def _windows(fields: Fields, num_layers: int) -> Windows:
    """Without ``layer_types`` every other layer has one, from the first, below ``max_window_layers``: its class in
    transformers 5 counts from the other end than Qwen2's."""
    if not fields.flag("use_sliding_window") or layer_kinds(fields, num_layers) is not None:
        return upper_windows(fields, num_layers)
    window, stop = fields.optional_whole("sliding_window"), fields.whole("max_window_layers", least=0)
    return tuple(window if layer % 2 == 0 and layer < stop else None for layer in range(num_layers))


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
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    },
    frozenset({"num_key_value_heads", "mlp_only_layers", "sliding_window"}),
    describe,
    frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}),
)
