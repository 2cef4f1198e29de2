"""Models of no family, with what pictures have to show of some: mixers, packed words, a shared expert, many sorts."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.synthetic import make_config
from tpctl.arch import mixture, parts
from tpctl.arch.block import CutBlock, Mixer
from tpctl.arch.config import ModelConfig
from tpctl.arch.family import Sizes
from tpctl.arch.linear import Linear, Norm, Vector
from tpctl.arch.quantised import Cutting, cut_by, quantised
from tpctl.arch.storage import Axis, Entry, Storage
from tpctl.partition.cuts import QueryHeads, Whole
from tpctl.partition.split import Part, Rule

WORDS = Storage(
    "AWQ, 4 bits, groups of 32",
    (
        Entry(".qweight", "qweight", ("I32",), Axis(1, 8, packed=True), Axis(0)),
        Entry(".qzeros", "qzeros", ("I32",), Axis(1, 8, packed=True), Axis(0, 32)),
        Entry(".scales", "scales", ("F16",), Axis(1), Axis(0, 32)),
    ),
)
"""Values and zero points packed along the outputs, stored [inputs, outputs], so that parts lie beside each other."""


class Packed:
    """All linears but routers and the recurrent mixer's are ``WORDS``."""

    unused = ()

    def storage(self, names: list[str]) -> Storage | None:
        return None if any("linear_attn" in name or "shared_expert_gate" in name for name in names) else WORDS


def mixed(cutting: Cutting = Cutting(), *, packed: bool = True) -> ModelConfig:
    """Six layers: a dense one with a window, then recurrent ones and one of attention, with eight experts and a shared
    one. Hidden size 256, 8 query and 2 KV heads of 32."""
    sizes = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 512}
    config = ModelConfig.from_dict(make_config("qwen3", num_hidden_layers=1, vocab_size=512, **sizes))
    (first,) = config.blueprint.blocks
    heads = QueryHeads(8, 8, 32)

    def linear(name: str, rule: Rule = Rule.COLUMN) -> Linear:
        if rule is Rule.ROW:
            return Linear(name, rule, (Part(name, 256, Whole()),), 256, heads)
        return Linear(name, rule, (Part(name, 256, heads if rule is Rule.COLUMN else Whole()),), 256)

    recurrent = Mixer(
        "gated delta net",
        (
            linear("linear_attn.in_proj_z"),
            Vector("linear_attn.conv1d.weight", 256, heads, (1, 4)),
            Vector("linear_attn.A_log", 8, QueryHeads(8, 8, 1)),
            Norm("linear_attn.norm", 32, 1e-6),
            linear("linear_attn.out_proj", Rule.ROW),
        ),
        8,
        0,
        0,
    )
    experts = mixture.experts(
        256,
        192,
        8,
        2,
        shared=parts.gated(Sizes(256, 6, 8, 2, 32, 128, 512, 1e-6, False), "silu", where="mlp.shared_expert"),
        shared_gate="mlp.shared_expert_gate",
    )
    before, after = first.before_attention, first.before_mlp
    layers = tuple(
        CutBlock(mixer, (before, mixer, after, mlp))
        for mixer, mlp in (
            (replace(first.attention, window=128), first.mlp),
            *((recurrent if number % 3 else first.attention, experts) for number in range(1, 6)),
        )
    )
    blueprint = replace(config.blueprint, layers=layers)
    if packed:
        blueprint = quantised(blueprint, Packed())
    return replace(config, blueprint=cut_by(blueprint, cutting))


def scaled() -> ModelConfig:
    """A sandwich of norms, then two linears that all ranks have, one more norm, and a factor."""
    config = ModelConfig.from_dict(make_config("qwen3", num_hidden_layers=1))
    (first,) = config.blueprint.blocks
    norm = [replace(first.before_mlp, name=f"norm_{number}") for number in range(5)]
    whole = [mixture.whole("per_layer_gate", 24, 8), mixture.whole("per_layer_projection", 8, 24)]
    order = (norm[0], first.attention, norm[1], norm[2], first.mlp, norm[3], *whole, norm[4], Vector("scalar", 1))
    blueprint = replace(config.blueprint, layers=(CutBlock(first.attention, order),))
    return replace(config, blueprint=blueprint)


def parallel() -> ModelConfig:
    """A layer whose MLP reads what its attention reads."""
    config = ModelConfig.from_dict(make_config("qwen3", num_hidden_layers=1))
    (first,) = config.blueprint.blocks
    block = CutBlock(first.attention, (first.before_attention, first.attention, first.mlp))
    return replace(config, blueprint=replace(config.blueprint, layers=(block,)))


def post_normed() -> ModelConfig:
    """A layer that norms what it adds and not what it reads, with a QK-norm over all heads."""
    config = ModelConfig.from_dict(make_config("qwen3", num_hidden_layers=1))
    (first,) = config.blueprint.blocks
    query = QueryHeads(4, 2, 6)
    attention = replace(first.attention, q_norm=Norm("self_attn.q_norm", 24, 1e-6, cut=query))
    block = CutBlock(attention, (attention, first.before_attention, first.mlp, first.before_mlp))
    return replace(config, blueprint=replace(config.blueprint, layers=(block,)))
