"""gpt-oss: attention with a sink a head and biases everywhere; experts stacked, gate and up row by row in turn."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import Experts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, MOST_EXPERTS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Vector
from tpctl.arch.mixers import grouped
from tpctl.arch.mixture import scores
from tpctl.arch.storage import FUSED_TRANSPOSED
from tpctl.partition.cuts import Even, QueryHeads, Scaled, Whole
from tpctl.partition.split import Part, Rule, Stack

ARCHITECTURE = "GptOssForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    bias = fields.flag("attention_bias")
    sinks = Vector("self_attn.sinks", sizes.num_heads, QueryHeads(sizes.num_heads, sizes.num_kv_heads, 1))
    attention = grouped(sizes, "attention with sinks", sinks, qkv_bias=bias, o_bias=bias)
    count = fields.whole(fields.either("num_local_experts", "num_experts"), most=MOST_EXPERTS)
    experts = _experts(sizes, count, fields.whole("num_experts_per_tok", most=count))
    return parts.model(sizes, (parts.cut_block(sizes, attention, experts),) * sizes.num_layers)


def _experts(sizes: Sizes, count: int, per_token: int) -> Experts:
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
        router=scores("mlp.router", hidden, count, bias=True),
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
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
    },
    frozenset({"num_key_value_heads", "head_dim"}),
    describe,
    runs=False,
)
