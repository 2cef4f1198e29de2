"""Qwen3-Next: gated delta nets in three layers of four, attention with an output gate in the fourth, and experts."""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import delta_net, mixture, parts
from tpctl.arch.block import Attention, Block, Experts, Gated, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import layer_kinds, refuse_window
from tpctl.errors import UnsupportedModelError

ARCHITECTURE = "Qwen3NextForCausalLM"
LINEAR, FULL = "linear_attention", "full_attention"
LEFT_OUT = (r"mtp\..*",)
"""What predicts more tokens at once; of it one layer is used."""
LAYERS = {
    "attention_bias": False,
    "head_dim": 256,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    **delta_net.DEFAULTS,
}
"""Defaults of what Qwen3.5 shares."""
NULLABLE = frozenset({"partial_rotary_factor", "sliding_window"})
OWN = frozenset({"attn_output_gate"})
EXPERTS = frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"})
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""RoPE's settings for positions in an image; a text's are alike along each axis."""


def kinds(fields: Fields, num_layers: int) -> list[str]:
    """Each layer's kind: by its name, or every so many with full attention."""
    if (named := layer_kinds(fields, num_layers, (FULL, LINEAR))) is not None:
        return named
    every = fields.whole("full_attention_interval")
    return [LINEAR if (layer + 1) % every else FULL for layer in range(num_layers)]


def attention(fields: Fields, sizes: Sizes, architecture: str) -> Attention:
    """That of the layers with full attention."""
    if fields.get("attn_output_gate") is False:
        raise UnsupportedModelError(
            f"config.json: attn_output_gate is false, but {architecture} has a gate; remove the field"
        )
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, architecture, sizes.head_dim, partial=True, unread=_OF_IMAGES)
    refuse_window(fields, rope.longest, architecture)
    return parts.attention(sizes, rope, qkv_bias=bias, o_bias=bias, qk_norm=True, unit_offset=True, gate=True)


def block(sizes: Sizes, mixer: Attention | Mixer, mlp: Gated | Experts) -> Block:
    """A layer, with norms whose factor is 1 + weight."""
    before, after = (parts.offset_norm(sizes, name) for name in ("input_layernorm", "post_attention_layernorm"))
    return Block(before, mixer, after, mlp)


def model(sizes: Sizes, layers: tuple[Block, ...], further: Block) -> Blueprint:
    """All of them, before a norm of that kind; and one that predicts one token more."""
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    predictor = parts.predictor(sizes, further, "mtp.", "mtp.layers.0.", names, unit_offset=True)
    norm = parts.offset_norm(sizes, "model.norm")
    return replace(parts.model(sizes, layers), norm=norm, further=predictor, left_out=LEFT_OUT)


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    experts = mixture.weighed(fields, sizes, mixture.softmax(fields))
    mlp = parts.gated(sizes, parts.read_activation(fields))
    net = delta_net.by_key_head(delta_net.read_sizes(fields), sizes)
    mixer: dict[str, Attention | Mixer] = {LINEAR: net, FULL: attention(fields, sizes, ARCHITECTURE)}
    sparse = mixture.sparse_layers(fields, sizes.num_layers)
    layers = (
        block(sizes, mixer[kind], experts if one else mlp)
        for kind, one in zip(kinds(fields, sizes.num_layers), sparse, strict=True)
    )
    return model(sizes, tuple(layers), block(sizes, mixer[FULL], experts))


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        **LAYERS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    NULLABLE | {"mlp_only_layers"},
    describe,
    OWN | EXPERTS,
)
