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
from tpctl.arch.block import Attention, BesideMLP, Block, Experts, Gated, LayerInput, LayerPart
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families.gemma3 import ACTIVATIONS, model
from tpctl.arch.family import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Norm, Vector
from tpctl.arch.rope import BY_LAYER, PROPORTIONAL, RopeConfig, read_rope_of
from tpctl.arch.routing import Routing
from tpctl.arch.seeing import seeing
from tpctl.arch.storage import FUSED
from tpctl.arch.windows import FULL, SLIDING, full_every, layer_kinds, mixed_windows
from tpctl.errors import CheckpointError, UnsupportedModelError, shown
from tpctl.partition.cuts import Cut, Even, Vocab, Whole
from tpctl.partition.split import EACH, Part, Rule, Stack

KINDS = {**BY_LAYER, PROPORTIONAL: PROPORTIONAL}
ROPES: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
"""Where a config has no ``rope_parameters``."""
EVERY = 6
"""One layer in so many is global, where no ``layer_types`` says it."""


@dataclass(frozen=True)
class _Kind:
    """What the layers of one sort share: ``name`` and ``sizes``, which of q, k and v they compute, and, of those that
    compute q alone, whose keys and values they read."""

    name: str
    sizes: Sizes
    held: str
    reads: int | None = None


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields, "hidden_activation", ACTIVATIONS)
    _refuse(fields)
    kinds = _kinds(fields, sizes)
    windows = mixed_windows(fields, [kind.name for kind in kinds])
    ropes = _ropes(fields, kinds)
    bias, owners = fields.flag("attention_bias"), {kind.reads for kind in kinds}
    experts = _experts(fields, sizes) if fields.flag("enable_moe_block") else None
    per_layer = fields.whole("hidden_size_per_layer_input", least=0)
    blocks = []
    for layer, (kind, window) in enumerate(zip(kinds, windows, strict=True)):
        attention = _attention(kind, ropes[kind.name], window, bias)
        mlp = parts.gated(kind.sizes, activation)
        blocks.append(_block(sizes, replace(attention, shared=layer in owners), mlp, experts, per_layer))
    return replace(
        model(fields, sizes, tuple(blocks)),
        norm=_norm(sizes, "model.norm"),
        left_out=_unread(kinds),
        beside=tuple(_per_layer_inputs(fields, sizes, per_layer)) if per_layer else (),
        lacks=_lacks(fields, sizes) if per_layer else None,
    )


def _refuse(fields: Fields) -> None:
    """Refuse what changes every result, and what transformers does not read though it looks so."""
    key = "use_bidirectional_attention"  # of images alone it says nothing of text
    if fields.get(key) not in (None, False, "vision"):
        raise UnsupportedModelError(f"config.json: {key} is {shown(fields.get(key))}, which is not supported")
    if fields.get("rope_scaling") is not None:
        raise UnsupportedModelError(
            f"config.json: rope_scaling is {shown(fields.get('rope_scaling'))}, which Gemma 4 does not read; "
            "write it into rope_parameters, by the kind of layer, or remove it"
        )


def _lacks(fields: Fields, sizes: Sizes) -> str | None:
    rows = fields.whole("vocab_size_per_layer_input")
    return f"embeddings for each layer of {rows} tokens out of {sizes.vocab_size}" if rows < sizes.vocab_size else None


def _kinds(fields: Fields, sizes: Sizes) -> list[_Kind]:
    """The sort of every layer. The last ones may read the keys and values of the last one before them of their kind."""
    names = layer_kinds(fields, sizes.num_layers) or full_every(EVERY, sizes.num_layers)
    names = [*names[:-1], FULL]  # transformers makes the last one global, whatever the config says
    reads = fields.whole("num_kv_shared_layers", least=0, most=MOST_LAYERS)
    first = max(sizes.num_layers - reads, 0)
    if reads and set(names[:first]) != set(names):
        raise CheckpointError(
            f"config.json: num_kv_shared_layers is {reads}, but the {first} layers before those have no keys "
            "and values for each kind of layer"
        )
    same, double = fields.flag("attention_k_eq_v"), fields.flag("use_double_wide_mlp")
    heads = _heads_by_layer(fields, sizes, names, same)
    last = {name: layer for layer, name in enumerate(names[:first])}
    found = []
    for layer, (name, own) in enumerate(zip(names, heads, strict=True)):
        if layer < first:
            found.append(_Kind(name, own, "qk" if same and name == FULL else "qkv"))
            continue
        if own != heads[last[name]]:
            raise UnsupportedModelError(
                f"config.json: by per_layer_config layer {layer} has other heads than layer {last[name]}, whose keys "
                "and values it reads; make them alike"
            )
        wide = replace(own, intermediate_size=2 * own.intermediate_size) if double else own
        found.append(_Kind(name, wide, "q", last[name]))
    return found


def _ropes(fields: Fields, kinds: list[_Kind]) -> dict[str, RopeConfig]:
    """The RoPE of each kind of layer, whose heads are of one size."""
    if fields.get("rope_parameters") is None:
        fields = replace(fields, values={**fields.values, "rope_parameters": ROPES})
    found = {}
    for name in dict.fromkeys(kind.name for kind in kinds):
        dims = sorted({kind.sizes.head_dim for kind in kinds if kind.name == name})
        if len(dims) > 1:
            raise UnsupportedModelError(
                f"config.json: by per_layer_config layers of {name} have heads of {dims[0]} and of {dims[1]} "
                "dimensions; tpctl rotates those of one kind alike"
            )
        found[name] = read_rope_of(name, fields, "Gemma 4", dims[0], fields.get("rope_theta"), KINDS)
    return found


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


def _attention(kind: _Kind, rope: RopeConfig, window: int | None, bias: bool) -> Attention:
    """Attention; of a layer that reads another's keys and values, its queries alone, dealt as those are."""
    sizes, alone = kind.sizes, kind.reads is not None
    read, out = parts.projections(sizes, kind.held, qkv_bias=bias, o_bias=bias)
    q_norm, k_norm = (Norm(f"self_attn.{name}_norm", sizes.head_dim, sizes.eps, once=True) for name in "qk")
    return Attention(
        read,
        out,
        sizes.num_heads,
        sizes.num_kv_heads,
        sizes.head_dim,
        rope,
        scale=1.0,
        window=window,
        q_norm=q_norm,
        k_norm=None if alone else k_norm,
        value_eps=None if alone else sizes.eps,
        reads=kind.reads,
    )


def _norm(sizes: Sizes, name: str) -> Norm:
    return replace(parts.norm(sizes, name), once=True)


def _block(sizes: Sizes, attention: Attention, mlp: Gated, experts: Experts | None, per_layer: int) -> Block:
    """A layer. ``per_layer``: the size of its own embeddings, 0: none."""
    block = Block(
        _norm(sizes, "input_layernorm"),
        attention,
        _norm(sizes, "pre_feedforward_layernorm"),
        mlp,
        after_attention=_norm(sizes, "post_attention_layernorm"),
        after_mlp=_norm(sizes, "post_feedforward_layernorm"),
        scalar=Vector("layer_scalar", 1),
    )
    if experts is not None:
        norms = (f"{name}_layernorm_{n}" for name, n in (("post_feedforward", 1), ("pre_feedforward", 2)))
        after_mlp, before = (_norm(sizes, name) for name in norms)
        beside = BesideMLP(after_mlp, before, experts, _norm(sizes, "post_feedforward_layernorm_2"))
        block = replace(block, experts=beside)
    if per_layer:
        # Whole on every rank: they are small, and a sum over the ranks would cost more than they do.
        gate = mixture.whole("per_layer_input_gate", sizes.hidden_size, per_layer)
        projection = mixture.whole("per_layer_projection", per_layer, sizes.hidden_size)
        block = replace(block, input=LayerInput(gate, projection, _norm(sizes, "post_per_layer_input_norm")))
    return block


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
        routing=Routing("softmax", renormalise=True),
        activation="gelu_tanh",
        router_eps=sizes.eps,
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
    yield Norm("model.per_layer_projection_norm", per_layer, sizes.eps, once=True)


def _unread(kinds: list[_Kind]) -> tuple[str, ...]:
    """Keys and values of layers that read those of others: published files hold them, and nobody uses them."""
    layers = "|".join(str(layer) for layer, kind in enumerate(kinds) if kind.reads is not None)
    if not layers:
        return ()
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
    "sliding_window": 1024,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
TEXT = Family(
    "Gemma4ForCausalLM",
    {
        **UNIFIED_DEFAULTS,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
    },
    frozenset({"num_global_key_value_heads"}),
    describe,
    own=frozenset(
        {
            *("hidden_activation", "use_bidirectional_attention", "final_logit_softcapping", "per_layer_config"),
            *("num_kv_shared_layers", "num_experts", "moe_intermediate_size", "attention_k_eq_v", "enable_moe_block"),
            "top_k_experts",
            *("use_double_wide_mlp", "hidden_size_per_layer_input"),
        }
    ),
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
