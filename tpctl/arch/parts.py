"""The parts that most families are built from: norms, attention and gated MLPs under the names of Llama's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tpctl.arch.block import Activation, Attention, Block, CutBlock, Experts, Gated, Layer, LayerPart, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Norm, Vector, below
from tpctl.arch.predictor import Predictor
from tpctl.arch.rope import RopeConfig
from tpctl.errors import UnsupportedModelError, shown
from tpctl.partition.cuts import Cut, Even, KVHeads, QueryHeads, Whole
from tpctl.partition.split import Part, Rule

SILU: Mapping[str, Activation] = {"silu": "silu", "swish": "silu"}
"""Names of the activation that most families have."""


def read_activation(fields: Fields, key: str = "hidden_act", known: Mapping[str, Activation] = SILU) -> Activation:
    """The activation that the config names in field ``key``, by the name that kernels know it by."""
    name = fields.get(key)
    if not isinstance(name, str) or name not in known:
        names = ", ".join(dict.fromkeys(known.values()))
        raise UnsupportedModelError(f"activation {shown(name)} is not supported ({key}); tpctl knows {names}")
    return known[name]


def attention(
    sizes: Sizes,
    rope: RopeConfig | None,
    window: int | None = None,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    unit_offset: bool = False,
    whole_norms: bool = False,
    sinks: bool = False,
    fused: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    gate: bool = False,
) -> Attention:
    """Grouped-query attention.

    Args:
        qk_norm, unit_offset: RMSNorm over each query and key head before RoPE, and of which kind.
        whole_norms: instead of that, RMSNorm over all query heads at once, and over all key heads.
        sinks: each query head has a score that joins its softmax.
        fused: the source stores ``qkv_proj`` as one tensor.
        scale: of the scores; by default one over the root of the head's size.
        gate: as of ``projections``.
    """
    qkv, out = projections(sizes, gate=gate, qkv_bias=qkv_bias, o_bias=o_bias, fused=fused)
    head_dim, q_norm, k_norm = sizes.head_dim, None, None
    if whole_norms:
        q_norm, k_norm = norms_over_all(sizes)
    elif qk_norm:
        q_norm, k_norm = (Norm(f"self_attn.{label}_norm", head_dim, sizes.eps, unit_offset) for label in "qk")
    sunk = Vector("self_attn.sinks", sizes.num_heads, QueryHeads(sizes.num_heads, sizes.num_kv_heads, 1))
    return Attention(
        qkv=qkv,
        out=out,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        q_norm=q_norm,
        k_norm=k_norm,
        sinks=sunk if sinks else None,
        gate=gate,
    )


def norms_over_all(sizes: Sizes) -> tuple[Norm, Norm]:
    """One over all query heads at once, and one over all key heads."""
    heads = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    return (
        Norm("self_attn.q_norm", sizes.num_heads * sizes.head_dim, sizes.eps, cut=QueryHeads(*heads)),
        Norm("self_attn.k_norm", sizes.num_kv_heads * sizes.head_dim, sizes.eps, cut=KVHeads(*heads)),
    )


def projections(
    sizes: Sizes,
    held: str = "qkv",
    *,
    gate: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    fused: bool = False,
) -> tuple[Linear, Linear]:
    """What grouped-query attention reads, below each other, and its output; cut in whole heads.

    Args:
        held: which of queries, keys and values there are.
        gate: each query head is followed by as many rows that gate its output (Qwen3-Next).
        fused: as of ``attention``.
    """
    query_heads, kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    query = QueryHeads(query_heads, kv_heads, head_dim)
    rows = head_dim * (2 if gate else 1)
    kv = KVHeads(query_heads, kv_heads, head_dim)
    each: dict[str, tuple[int, Cut]] = {
        "q": (query_heads * rows, QueryHeads(query_heads, kv_heads, rows)),
        "k": (kv_heads * head_dim, kv),
        "v": (kv_heads * head_dim, kv),
    }
    stacked = _stacked("self_attn", held, tuple((label, *each[label]) for label in held), fused)
    out = Part("self_attn.o_proj", sizes.hidden_size, Whole())
    return (
        Linear(f"self_attn.{held}_proj", Rule.QKV, stacked, sizes.hidden_size, bias=qkv_bias),
        Linear("self_attn.o_proj", Rule.ROW, (out,), query_heads * head_dim, query, bias=o_bias),
    )


def gated(
    sizes: Sizes, activation: Activation, *, where: str = "mlp", bias: bool = False, fused: bool = False
) -> Gated:
    """A gated MLP in module ``where``; ``fused``: the source stores ``gate_up_proj`` as one tensor."""
    width, hidden = sizes.intermediate_size, sizes.hidden_size
    sections = (("gate", width, Even()), ("up", width, Even()))
    stacked = _stacked(where, "gate_up", sections, fused)
    down = Part(f"{where}.down_proj", hidden, Whole())
    return Gated(
        gate_up=Linear(f"{where}.gate_up_proj", Rule.MERGED_COLUMN, stacked, hidden, bias=bias),
        down=Linear(f"{where}.down_proj", Rule.ROW, (down,), width, Even(), bias=bias),
        activation=activation,
    )


def block(sizes: Sizes, attention: Attention | Mixer, mlp: Gated | Experts) -> Block:
    """A block with one norm before attention and one before the MLP."""
    return Block(
        before_attention=norm(sizes, "input_layernorm"),
        attention=attention,
        before_mlp=norm(sizes, "post_attention_layernorm"),
        mlp=mlp,
    )


def sandwich(sizes: Sizes, attention: Attention, mlp: Gated) -> Block:
    """A block of Gemma's: a norm of another kind before and behind attention and MLP."""
    return Block(
        before_attention=offset_norm(sizes, "input_layernorm"),
        attention=attention,
        after_attention=offset_norm(sizes, "post_attention_layernorm"),
        before_mlp=offset_norm(sizes, "pre_feedforward_layernorm"),
        mlp=mlp,
        after_mlp=offset_norm(sizes, "post_feedforward_layernorm"),
    )


def norm(sizes: Sizes, name: str) -> Norm:
    """RMSNorm of the residual."""
    return Norm(name, sizes.hidden_size, sizes.eps)


def rounded_once(blueprint: Blueprint) -> Blueprint:
    """``blueprint`` with norms that round the product with their weight alone, as transformers has them of OLMo 2 and 3
    and of gpt-oss."""

    def once(one: Norm | None) -> Norm | None:
        return None if one is None else replace(one, once=True)

    def changed(old: Layer) -> Layer:
        assert isinstance(old, Block)
        attention = old.attention
        if isinstance(attention, Attention):
            attention = replace(attention, q_norm=once(attention.q_norm), k_norm=once(attention.k_norm))
        return replace(
            old,
            before_attention=once(old.before_attention),
            attention=attention,
            after_attention=once(old.after_attention),
            before_mlp=once(old.before_mlp),
            after_mlp=once(old.after_mlp),
        )

    return replace(blueprint, layers=tuple(map(changed, blueprint.layers)), norm=replace(blueprint.norm, once=True))


def offset_norm(sizes: Sizes, name: str) -> Norm:
    """The same with a factor of 1 + weight."""
    return Norm(name, sizes.hidden_size, sizes.eps, unit_offset=True)


def cut_block(sizes: Sizes, mixer: Attention | Mixer, *mlp: LayerPart) -> CutBlock:
    """The same, of a layer that tpctl cuts and does not run."""
    return CutBlock(mixer, (norm(sizes, "input_layernorm"), mixer, norm(sizes, "post_attention_layernorm"), *mlp))


def model(sizes: Sizes, layers: tuple[Layer, ...]) -> Blueprint:
    """A model with one norm before its head."""
    return Blueprint(sizes.vocab_size, sizes.hidden_size, layers, norm(sizes, "model.norm"), sizes.tied)


def predictor(
    sizes: Sizes,
    block: Block,
    source: str,
    block_source: str,
    names: tuple[str, str, str, str],
    *,
    unit_offset: bool = False,
) -> Predictor:
    """A layer that predicts one token more.

    Args:
        source, block_source: as of ``Predictor``.
        names: in a checkpoint, of the embedding's norm, the state's, the projection and the last norm.
        unit_offset: the norms' factor is 1 + weight.
    """
    stored = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    embedding, hidden, _, last = (
        Norm(name, sizes.hidden_size, sizes.eps, unit_offset=unit_offset, source=other)
        for name, other in zip(stored, names, strict=True)
    )
    outputs = (Part(names[2], sizes.hidden_size, Whole()),)
    projection = Linear(stored[2], Rule.ROW, outputs, 2 * sizes.hidden_size, Even())
    return Predictor(embedding, hidden, projection, block, last, source, block_source)


def _stacked(where: str, name: str, sections: tuple[tuple[str, int, Cut], ...], fused: bool) -> tuple[Part, ...]:
    """Parts (label, length, cut) of a merged linear: of one source tensor, or of one each."""
    if fused:
        return below(f"{where}.{name}_proj", sections)
    return tuple(Part(f"{where}.{label}_proj", length, cut, label=label) for label, length, cut in sections)
