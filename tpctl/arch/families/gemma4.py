"""Gemma 4: global layers with heads of another size, keys that serve as values, layers that read the keys and values of
an earlier one (E2B, E4B), embeddings for each layer (E2B, E4B), experts beside the dense MLP (26B-A4B).

    q_norm, k_norm   over each head; values are normed without weights
    layer_scalar     one number that a layer's result is multiplied by
    router           scores what is normed without weights and multiplied by router.scale; the weight of a chosen
                     expert is multiplied by its per_expert_scale

gemma4_unified is the same without experts and without embeddings for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tpctl.arch import mixture, parts
from tpctl.arch.block import CutBlock, Experts, LayerPart, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families.gemma3 import ACTIVATIONS
from tpctl.arch.family import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Norm, Vector
from tpctl.arch.seeing import seeing
from tpctl.arch.storage import FUSED
from tpctl.arch.windows import FULL, SLIDING, layer_kinds
from tpctl.errors import CheckpointError, UnsupportedModelError, shown
from tpctl.partition.cuts import Cut, Even, Vocab, Whole
from tpctl.partition.split import EACH, Part, Rule, Stack

KIND = "attention that norms its values"
EVERY = 6
"""One layer in so many is global, where no ``layer_types`` says it."""


@dataclass(frozen=True)
class _Kind:
    """What the layers of one sort share: their ``sizes``, and which of q, k and v they compute."""

    sizes: Sizes
    held: str


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields, "hidden_activation", ACTIVATIONS)
    kinds, reads = _kinds(fields, sizes)
    bias = fields.flag("attention_bias")
    experts = _experts(fields, sizes) if fields.flag("enable_moe_block") else None
    per_layer = fields.whole("hidden_size_per_layer_input", least=0)
    made: dict[_Kind, CutBlock] = {}
    for kind in kinds:
        if kind not in made:
            mixer = _mixer(kind, bias)
            mlp = parts.gated(kind.sizes, activation)
            made[kind] = CutBlock(mixer, tuple(_parts(sizes, mixer, mlp, experts, per_layer)))
    model = parts.model(sizes, tuple(made[kind] for kind in kinds))
    return replace(
        model,
        left_out=_unread(sizes.num_layers, reads),
        beside=tuple(_per_layer_inputs(fields, sizes, per_layer)) if per_layer else (),
    )


def _kinds(fields: Fields, sizes: Sizes) -> tuple[list[_Kind], int]:
    """The sort of every layer, and how many of the last ones read an earlier one's keys and values."""
    names = layer_kinds(fields, sizes.num_layers)
    if names is None:
        names = [SLIDING if (layer + 1) % EVERY else FULL for layer in range(sizes.num_layers)]
    names = [*names[:-1], FULL]  # transformers makes the last one global, whatever the config says
    reads = fields.whole("num_kv_shared_layers", least=0, most=MOST_LAYERS)
    first = sizes.num_layers - reads
    if reads and not set(names[first:]) <= set(names[: max(first, 0)]):
        raise CheckpointError(
            f"config.json: num_kv_shared_layers is {reads}, but the {max(first, 0)} layers before those have no keys "
            "and values for each kind of layer"
        )
    same, double = fields.flag("attention_k_eq_v"), fields.flag("use_double_wide_mlp")
    heads = _heads_by_layer(fields, sizes, names, same)
    found = []
    for layer, (name, own) in enumerate(zip(names, heads, strict=True)):
        if layer >= first:
            wide = replace(own, intermediate_size=2 * own.intermediate_size) if double else own
            found.append(_Kind(wide, "q"))
        else:
            found.append(_Kind(own, "qk" if same and name == FULL else "qkv"))
    return found, reads


def _heads_by_layer(fields: Fields, sizes: Sizes, names: list[str], same: bool) -> list[Sizes]:
    """``sizes`` with each layer's own KV heads and head dimension.

    Published files have ``global_head_dim`` and ``num_global_key_value_heads`` (read where keys serve as values);
    transformers 5 writes ``per_layer_config`` instead, and then reads nothing else.
    """
    if "per_layer_config" not in fields:
        dim = fields.whole("global_head_dim")
        kv = fields.optional_whole("num_global_key_value_heads", most=MOST_HEADS) if same else None
        other = replace(sizes, head_dim=dim, num_kv_heads=kv or sizes.num_kv_heads)
        return [other if name == FULL else sizes for name in names]
    found = [sizes] * len(names)
    for key in fields.mapping("per_layer_config"):
        layer = int(key) if key.isdecimal() else -1
        if not 0 <= layer < len(names):
            raise CheckpointError(
                f"config.json: per_layer_config has {shown(key)}, but the layers are 0 to {len(names) - 1}"
            )
        own = fields.inside("per_layer_config").inside(key)
        if unknown := sorted(own.values.keys() - {"head_dim", "num_key_value_heads"}):
            raise UnsupportedModelError(
                f"config.json: per_layer_config of layer {layer} has {shown(unknown[0])}, which is not supported; "
                "tpctl knows head_dim and num_key_value_heads"
            )
        found[layer] = replace(
            sizes,
            head_dim=own.optional_whole("head_dim") or sizes.head_dim,
            num_kv_heads=own.optional_whole("num_key_value_heads", most=MOST_HEADS) or sizes.num_kv_heads,
        )
    return found


def _mixer(kind: _Kind, bias: bool) -> Mixer:
    """Attention; of a layer that reads another's keys and values, its queries alone, dealt as those are."""
    sizes, head_dim = kind.sizes, kind.sizes.head_dim
    read, out = parts.projections(sizes, kind.held, qkv_bias=bias, o_bias=bias)
    names = ("q_norm",) if kind.held == "q" else ("q_norm", "k_norm")
    norms = (Norm(f"self_attn.{name}", head_dim, sizes.eps) for name in names)
    kept = 0 if kind.held == "q" else 2 * head_dim
    return Mixer(KIND, (read, *norms, out), sizes.num_heads, sizes.num_kv_heads, kept)


def _parts(sizes: Sizes, mixer: Mixer, mlp: LayerPart, experts: Experts | None, per_layer: int) -> Iterator[LayerPart]:
    """A layer, in the order of its forward pass. ``per_layer``: the size of a layer's own embeddings, 0: none."""
    yield parts.norm(sizes, "input_layernorm")
    yield mixer
    yield parts.norm(sizes, "post_attention_layernorm")
    yield parts.norm(sizes, "pre_feedforward_layernorm")
    yield mlp
    if experts is not None:
        yield parts.norm(sizes, "post_feedforward_layernorm_1")
        yield parts.norm(sizes, "pre_feedforward_layernorm_2")
        yield experts
        yield parts.norm(sizes, "post_feedforward_layernorm_2")
    yield parts.norm(sizes, "post_feedforward_layernorm")
    if per_layer:
        # Whole on every rank: they are small, and a sum over the ranks would cost more than they do.
        yield mixture.whole("per_layer_input_gate", sizes.hidden_size, per_layer)
        yield mixture.whole("per_layer_projection", per_layer, sizes.hidden_size)
        yield parts.norm(sizes, "post_per_layer_input_norm")
    yield Vector("layer_scalar", 1)


def _experts(fields: Fields, sizes: Sizes) -> Experts:
    """The experts, stacked in a checkpoint of floats; a quantised one may have them apart."""
    count, hidden = fields.whole("num_experts", most=MOST_EXPERTS), sizes.hidden_size
    width, per_token = fields.whole("moe_intermediate_size"), fields.whole("top_k_experts", most=count)
    stack = Stack(count, Whole())

    def stacked(name: str, rule: Rule, *rows: Part) -> Linear:
        inputs = width if rule is Rule.ROW else hidden
        cut: Cut = Even() if rule is Rule.ROW else Whole()
        return Linear(f"experts.{name}", rule, rows, inputs, cut, stack=stack, joiner="_")

    fused, apart = "experts.gate_up_proj", f"experts.{EACH}"
    router = (
        Vector("router.scale", hidden),
        mixture.whole("router.proj", hidden, count),
        Vector("router.per_expert_scale", count),
    )
    return Experts(
        count,
        per_token,
        gate_up=replace(
            stacked(
                "w13",
                Rule.MERGED_COLUMN,
                Part(fused, width, Even(), label="gate"),
                Part(fused, width, Even(), offset=width, label="up"),
            ),
            storage=FUSED,
        ),
        down=replace(stacked("w2", Rule.ROW, Part("experts.down_proj", hidden, Whole())), storage=FUSED),
        router=router,
        forms=(
            (
                stacked(
                    "w13",
                    Rule.MERGED_COLUMN,
                    Part(f"{apart}.gate_proj", width, Even(), label="gate"),
                    Part(f"{apart}.up_proj", width, Even(), label="up"),
                ),
                stacked("w2", Rule.ROW, Part(f"{apart}.down_proj", hidden, Whole())),
                router,
            ),
        ),
    )


def _per_layer_inputs(fields: Fields, sizes: Sizes, per_layer: int) -> Iterator[LayerPart]:
    """A table of embeddings for all layers, cut by rows as the first one is, and what adds the hidden state to them."""
    rows, width = fields.whole("vocab_size_per_layer_input"), sizes.num_layers * per_layer
    table = "model.embed_tokens_per_layer"
    yield Linear(table, Rule.VOCAB, (Part(table, rows, Vocab()),), width)
    yield mixture.whole("model.per_layer_model_projection", sizes.hidden_size, width)
    yield Norm("model.per_layer_projection_norm", per_layer, sizes.eps)


def _unread(num_layers: int, reads: int) -> tuple[str, ...]:
    """Keys and values of layers that read those of others: published files hold them, and nobody uses them."""
    if not reads:
        return ()
    layers = "|".join(map(str, range(num_layers - reads, num_layers)))
    return (rf"(model\.|(model\.)?language_model\.(model\.)?)layers\.({layers})\.self_attn\.[kv]_(proj|norm)\..*",)


UNIFIED_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
TEXT = Family(
    "Gemma4ForCausalLM",
    {
        **UNIFIED_DEFAULTS,
        "max_position_embeddings": 131072,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
    },
    frozenset(),
    describe,
    runs=False,
)
UNIFIED_TEXT = replace(TEXT, architecture="Gemma4UnifiedForCausalLM", defaults=UNIFIED_DEFAULTS)
FAMILY = seeing(
    "Gemma4ForConditionalGeneration",
    {"gemma4_text": TEXT},
    ("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
)
UNIFIED = seeing(
    "Gemma4UnifiedForConditionalGeneration",
    {"gemma4_unified_text": UNIFIED_TEXT},
    ("vision_embedder", "embed_vision", "embed_audio"),
)
