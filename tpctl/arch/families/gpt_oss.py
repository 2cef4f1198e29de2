"""gpt-oss: attention with a sink a head, a window in every second layer, and biases everywhere; experts stacked, gate
and up row by row in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpctl.arch import mixture, parts
from tpctl.arch.block import Clamped, Experts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, MOST_EXPERTS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear
from tpctl.arch.rope import RopeConfig, read_rope
from tpctl.arch.routing import Routing
from tpctl.arch.storage import FUSED_TRANSPOSED
from tpctl.arch.windows import full_every, layer_kinds, mixed_windows
from tpctl.partition.cuts import Even, Scaled, Whole
from tpctl.partition.split import Part, Rule, Stack

ARCHITECTURE = "GptOssForCausalLM"
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The RoPE of a config that says nothing of it."""


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope, bias = _rope(fields, sizes), fields.flag("attention_bias")
    kinds = layer_kinds(fields, sizes.num_layers) or full_every(2, sizes.num_layers)
    count = fields.whole(fields.either("num_local_experts", "num_experts"), most=MOST_EXPERTS)
    per_token = fields.whole(fields.either("num_experts_per_tok", "experts_per_token"), most=count)
    parts.read_activation(fields)  # which it names, and does not have
    alpha, limit = (fields.number(f"swiglu_{name}", least=1e-3, most=1e3) for name in ("alpha", "limit"))
    experts = _experts(sizes, count, per_token, Clamped(alpha, limit))
    attentions = (
        parts.attention(sizes, rope, window, qkv_bias=bias, o_bias=bias, sinks=True)
        for window in mixed_windows(fields, kinds)
    )
    return parts.rounded_once(parts.model(sizes, tuple(parts.block(sizes, one, experts) for one in attentions)))


def _rope(fields: Fields, sizes: Sizes) -> RopeConfig:
    if fields.get("rope_parameters") is None and not fields.mapping("rope_scaling"):
        fields = replace(fields, values={**fields.values, "rope_parameters": YARN})
    return read_rope(fields, ARCHITECTURE, sizes.head_dim)


def _experts(sizes: Sizes, count: int, per_token: int, activation: Clamped) -> Experts:
    hidden, width, stack = sizes.hidden_size, sizes.intermediate_size, Stack(count, Whole())
    rows = Part("mlp.experts.gate_up_proj", 2 * width, Scaled(Even(), 2), label="gate_up")
    down = Part("mlp.experts.down_proj", hidden, Whole())
    return Experts(
        count,
        per_token,
        Linear(
            "mlp.experts.w13",
            Rule.MERGED_COLUMN,
            (rows,),
            hidden,
            bias=True,
            storage=FUSED_TRANSPOSED,
            stack=stack,
            joiner="_",
            bias_suffix="_bias",
        ),
        Linear(
            "mlp.experts.w2",
            Rule.ROW,
            (down,),
            width,
            Even(),
            bias=True,
            storage=FUSED_TRANSPOSED,
            stack=stack,
            joiner="_",
            bias_suffix="_bias",
        ),
        router=mixture.scores("mlp.router", hidden, count, bias=True),
        routing=Routing("softmax of chosen"),
        activation=activation,
    )


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    frozenset({"sliding_window"}),
    describe,
    mixture.OWN,
)
