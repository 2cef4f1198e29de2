"""Qwen3.5 and 3.6: the layers of Qwen3-Next, dense or with experts in each, and a tower that sees beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpctl.arch import delta_net, mixture, parts
from tpctl.arch.block import Attention, Experts, Gated, Mixer
from tpctl.arch.blueprint import ROOT, Blueprint
from tpctl.arch.families import qwen3_next
from tpctl.arch.families.qwen3_next import EXPERTS, FULL, LINEAR, NULLABLE, OWN
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.routing import Routing

DEFAULTS: dict[str, Any] = {
    **COMMON,
    **qwen3_next.LAYERS,
    "vocab_size": 248320,
    "num_attention_heads": 16,
    "max_position_embeddings": 32768,
}


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    return _model(fields, sizes, parts.gated(sizes, parts.read_activation(fields)))


def describe_moe(fields: Fields, sizes: Sizes) -> Blueprint:
    parts.read_activation(fields)  # which the experts have, and the convolutions
    return _model(fields, sizes, mixture.weighed(fields, sizes, Routing("softmax", renormalise=True)))


def _model(fields: Fields, sizes: Sizes, mlp: Gated | Experts) -> Blueprint:
    net = delta_net.by_value_head(delta_net.read_sizes(fields), sizes)
    mixer: dict[str, Attention | Mixer] = {LINEAR: net, FULL: qwen3_next.attention(fields, sizes, "Qwen3.5")}
    layers = (qwen3_next.block(sizes, mixer[kind], mlp) for kind in qwen3_next.kinds(fields, sizes.num_layers))
    return replace(
        qwen3_next.model(sizes, tuple(layers), qwen3_next.block(sizes, mixer[FULL], mlp)),
        towers=(r"model\.visual\..*",),
        roots=(ROOT, "model.language_model."),
    )


_DENSE = {
    **DEFAULTS,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
_MOE = {
    **DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 512,  # of an MLP that no layer has
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
_UNREAD = frozenset({"intermediate_size"})
_TEXT, _SEES = "ForCausalLM", "ForConditionalGeneration"

FAMILY = Family(f"Qwen3_5{_SEES}", _DENSE, NULLABLE, describe, OWN, others=(f"Qwen3_5{_TEXT}",), inner="text_config")
TEXT = Family(f"Qwen3_5{_TEXT}", _DENSE, NULLABLE, describe, OWN, others=(f"Qwen3_5{_SEES}",))
MOE = Family(
    f"Qwen3_5Moe{_SEES}",
    _MOE,
    NULLABLE,
    describe_moe,
    OWN | EXPERTS,
    others=(f"Qwen3_5Moe{_TEXT}",),
    inner="text_config",
    unset=_UNREAD,
)
MOE_TEXT = Family(
    f"Qwen3_5Moe{_TEXT}",
    _MOE,
    NULLABLE,
    describe_moe,
    OWN | EXPERTS,
    others=(f"Qwen3_5Moe{_SEES}",),
    unset=_UNREAD,
)
