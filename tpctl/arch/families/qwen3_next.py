"""Qwen3-Next: gated delta nets in three layers of four, attention with an output gate in the fourth, and experts."""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import mixture, parts
from tpctl.arch.block import CutBlock, Layer, LayerPart, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.delta_net import DEFAULTS, DeltaNet
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Norm
from tpctl.arch.mixers import grouped, head_norms
from tpctl.arch.windows import layer_kinds

ARCHITECTURE = "Qwen3NextForCausalLM"
LINEAR, FULL = "linear_attention", "full_attention"
LEFT_OUT = (r"mtp\..*",)
"""What predicts more tokens at once."""
LAYERS = {"attention_bias": False, "head_dim": 256, "full_attention_interval": 4, **DEFAULTS}
"""Defaults of what Qwen3.5 shares."""


def kinds(fields: Fields, num_layers: int) -> list[str]:
    """Each layer's kind: by its name, or every so many with full attention."""
    if (named := layer_kinds(fields, num_layers, (FULL, LINEAR))) is not None:
        return named
    every = fields.whole("full_attention_interval")
    return [LINEAR if (layer + 1) % every else FULL for layer in range(num_layers)]


def attention(fields: Fields, sizes: Sizes) -> Mixer:
    """That of the layers with full attention."""
    bias = fields.flag("attention_bias")
    norms = head_norms(sizes, unit_offset=True)
    return grouped(sizes, "attention with an output gate", *norms, gate=True, qkv_bias=bias, o_bias=bias)


def block(sizes: Sizes, mixer: Mixer, mlp: LayerPart) -> CutBlock:
    """A layer, with norms whose factor is 1 + weight."""
    before, after = (
        Norm(name, sizes.hidden_size, sizes.eps, unit_offset=True)
        for name in ("input_layernorm", "post_attention_layernorm")
    )
    return CutBlock(mixer, (before, mixer, after, mlp))


def model(sizes: Sizes, layers: tuple[Layer, ...]) -> Blueprint:
    """All of them, before a norm of that kind."""
    norm = Norm("model.norm", sizes.hidden_size, sizes.eps, unit_offset=True)
    return replace(parts.model(sizes, layers), norm=norm)


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    experts, mlp = mixture.weighed(fields, sizes), parts.gated(sizes, parts.read_activation(fields))
    mixer = {LINEAR: DeltaNet.read(fields).by_key_head(sizes), FULL: attention(fields, sizes)}
    sparse = mixture.sparse_layers(fields, sizes.num_layers)
    layers = (
        block(sizes, mixer[kind], experts if one else mlp)
        for kind, one in zip(kinds(fields, sizes.num_layers), sparse, strict=True)
    )
    return replace(model(sizes, tuple(layers)), left_out=LEFT_OUT)


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
        "mlp_only_layers": [],
    },
    frozenset({"mlp_only_layers"}),
    describe,
    runs=False,
)
