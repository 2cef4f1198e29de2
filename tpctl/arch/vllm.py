"""A model as vLLM 0.32 holds it: the names and the order of its parameters, before it turns them into what its kernels
want, which is when ``load_format="sharded_state"`` fills them.

Names are those of its modules (``model_executor/models/``); where a parameter has several, the first in the alphabet
(``sharded_state_loader.py``: ``_filter_subtensors``). Which of them it was seen to load, ``arch.compat`` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpctl.arch.block import Attention, Block, CutBlock, Layer, LayerPart, Mixer, with_weights
from tpctl.arch.blueprint import EMBEDDING, LM_HEAD, Blueprint
from tpctl.arch.formats.compressed import Compressed
from tpctl.arch.formats.fp8 import FP8
from tpctl.arch.formats.scheme import Scheme
from tpctl.arch.linear import Linear, Norm, Weight
from tpctl.arch.quantised import mapped
from tpctl.arch.storage import Entry
from tpctl.errors import UnsupportedModelError
from tpctl.partition.split import Part, Rule

SCALES: Mapping[str, tuple[int, tuple[int, ...]]] = dict.fromkeys(
    ("_k_scale", "_prob_scale", "_q_scale", "_v_scale"), (1, ())
)
"""Of each attention: numbers, 1 where keys and values are not kept in FP8, and their shape."""
_MORE: Mapping[type, Mapping[str, tuple[int, tuple[int, ...]]]] = {
    FP8: dict.fromkeys(("k_scale", "prob_scale", "q_scale", "v_scale"), (1, ())),
    Compressed: {
        **{f"{name}_scale": (1, (1,)) for name in "kqv"},
        **{f"{name}_zero_point": (0, (1,)) for name in "kqv"},
    },
}
"""More where the checkpoint is in such a format. vLLM's own value for FP8 is -1, which means that there is none, and
which it then reads as 1."""

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Names:
    """What vLLM calls otherwise.

    Attributes:
        pairs: patterns of names in a layer, and what they become.
        attention: the module that has the scales.
        latent: its attention has no scales of a format.
        vocabulary: names of the embedding and the head that are others.
        whole_norms: it has a norm over all heads whole on every rank.
        merged: linears that it stores below each other: the first one's name, the others', and that of all.
    """

    pairs: Pairs = ()
    attention: str = "self_attn.attn"
    latent: bool = False
    vocabulary: Mapping[str, str] | None = None
    whole_norms: bool = False
    merged: tuple[tuple[str, str, str], ...] = ()


_EXPERTS: Pairs = ((r"experts\.(w13|w2)$", r"experts.routed_experts.\1"),)
_GATE: Pairs = ((r"^mlp\.gate$", "mlp.experts.gate"),)
_SHARED: Pairs = (
    (r"^mlp\.shared_experts?\.", "mlp.experts._shared_experts._layer."),
    (r"^mlp\.shared_expert_gate$", "mlp.experts._shared_experts._layer.expert_gate"),
)
_BIAS = r"^mlp\.gate\.e_score_correction_bias$"
_NO_HEAD = {LM_HEAD: EMBEDDING}
_DELTA_NET = (
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_qkvz"),
    ("linear_attn.in_proj_b", "linear_attn.in_proj_a", "linear_attn.in_proj_ba"),
)

_FAMILIES: Mapping[str, Names] = {
    "cohere2": Names(vocabulary=_NO_HEAD),
    "deepseek_v3": Names(
        (
            *_EXPERTS,
            *_GATE,
            *_SHARED,
            (_BIAS, "mlp.experts.gate.e_score_correction_bias"),
            (r"^self_attn\.(q_proj|q_a_layernorm|q_b_proj|o_proj)$", r"self_attn.mla_attn.\1"),
        ),
        attention="self_attn.mla_attn.mla_attn",
        latent=True,
        merged=(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.fused_qkv_a_proj"),),
    ),
    "gemma2": Names(vocabulary=_NO_HEAD),
    "glm4_moe": Names((*_EXPERTS, *_SHARED, (_BIAS, "mlp.experts.routed_experts.e_score_correction_bias"))),
    "gpt_oss": Names(
        ((r"^self_attn\.", "attn."), *_EXPERTS), attention="attn.attn", vocabulary={EMBEDDING: "model.embedding.weight"}
    ),
    "minimax_m2": Names(_EXPERTS),
    "mixtral": Names(_EXPERTS),
    "olmo2": Names(whole_norms=True),
    "olmo3": Names(whole_norms=True),
    "qwen2_moe": Names((*_EXPERTS, *_SHARED)),
    "qwen3_5_moe_text": Names((*_EXPERTS, *_GATE, *_SHARED), merged=_DELTA_NET),
    "qwen3_5_text": Names(merged=_DELTA_NET),
    "qwen3_moe": Names((*_EXPERTS, *_GATE)),
    "qwen3_next": Names((*_EXPERTS, *_GATE, *_SHARED)),
}
_USUAL = Names()


def named(model_type: str, blueprint: Blueprint) -> Blueprint:
    """``blueprint`` with the parameters that vLLM has; a family that nobody has looked at there keeps its names."""
    names = _FAMILIES.get(model_type, _USUAL)
    vocabulary = dict(names.vocabulary or {})
    if not blueprint.tied:
        vocabulary = {old: new for old, new in vocabulary.items() if old == EMBEDDING}
    return replace(
        blueprint, layers=tuple(_layer(layer, names) for layer in blueprint.layers), stored=tuple(vocabulary.items())
    )


def constants(model_type: str, blueprint: Blueprint, scheme: Scheme | None) -> dict[str, tuple[int, tuple[int, ...]]]:
    """What vLLM wants of every attention beside its weights, by name: a number, and its shape."""
    names = _FAMILIES.get(model_type, _USUAL)
    more = {} if names.latent or scheme is None else _MORE.get(type(scheme), {})
    found = {**SCALES, **more}
    return {
        f"{blueprint.prefix.format(number)}{names.attention}.{name}": constant
        for number, layer in enumerate(blueprint.layers)
        if isinstance(layer.mixer, Attention) or not layer.mixer.recurrent
        for name, constant in found.items()
    }


def _held(linear: Linear) -> Linear:
    """``linear`` in the tensors that vLLM has of its format."""
    storage, entries = linear.storage, {entry.name for entry in linear.storage}
    if storage.constants:  # of merged weights the shape of one, as its loader leaves it
        shapes = (
            Entry(one, one.removeprefix("."), ("I64",), tail=(2,), role="shape", last=True) for one in storage.constants
        )
        return replace(linear, storage=replace(storage, entries=(*storage.entries, *shapes)))
    if storage.ordered is not None and "g_idx" in entries:  # groups as they come need none
        rest = tuple(entry for entry in storage if entry.name != "g_idx")
        return replace(linear, storage=replace(storage, entries=rest, unread=(storage.ordered[0],)))
    return linear


def _layer(layer: Layer, names: Names) -> Layer:
    def name(old: str) -> str:
        for pattern, new in names.pairs:
            old = re.sub(pattern, new, old)
        return old

    def one(weight: Weight) -> Weight:
        if isinstance(weight, Linear):
            return _held(replace(weight, name=name(weight.name)))
        if isinstance(weight, Norm) and names.whole_norms:
            weight = replace(weight, cut=None)
        new = name(weight.name)
        return weight if new == weight.name else replace(weight, name=new, source=weight.source or weight.name)

    if isinstance(layer, Block):  # of a family whose norms have the usual names

        def changed(part: LayerPart) -> LayerPart:
            return with_weights(_merged(part, names) if isinstance(part, Mixer) else part, one)

        return mapped(layer, changed)
    mixer = with_weights(_merged(layer.mixer, names), one)
    assert isinstance(mixer, Attention | Mixer)
    parts = tuple(mixer if part is layer.mixer else with_weights(part, one) for part in layer.parts)
    return CutBlock(mixer, parts)


def _merged(mixer: Attention | Mixer, names: Names) -> Attention | Mixer:
    """``mixer`` with linears below each other that are one for vLLM."""
    if isinstance(mixer, Attention):
        return mixer
    for first, second, together in names.merged:
        by_name = {part.name: part for part in mixer.parts}
        if {first, second} <= by_name.keys():
            one, other = by_name[first], by_name[second]
            assert isinstance(one, Linear) and isinstance(other, Linear)
            if one.storage != other.storage:
                raise UnsupportedModelError(
                    f"vLLM stores {first} and {second} as one, but they are {one.storage.format} and "
                    f"{other.storage.format}; leave --compat vllm out"
                )
            rule = one.rule if one.rule is Rule.REPLICATED else Rule.QKV
            both = replace(one, name=together, rule=rule, parts=(*_labelled(one), *_labelled(other)))
            parts = (both if part is one else part for part in mixer.parts if part is not other)
            mixer = replace(mixer, parts=tuple(parts))
    return mixer


def _labelled(linear: Linear) -> tuple[Part, ...]:
    """Its parts, each with what it is."""
    return tuple(part if part.label else replace(part, label=linear.name.rpartition("_")[2]) for part in linear.parts)
