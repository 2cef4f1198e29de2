"""The parts that most families are built from: norms, attention and gated MLPs under the names of Llama's weights."""

from __future__ import annotations

from collections.abc import Mapping

from tpctl.arch.block import Activation, Attention, Block, CutBlock, Gated, Layer, LayerPart, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Norm
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
    rope: RopeConfig,
    window: int | None = None,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    unit_offset: bool = False,
    fused: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Attention:
    """Grouped-query attention.

    Args:
        qk_norm, unit_offset: RMSNorm over each query and key head before RoPE, and of which kind.
        fused: the source stores ``qkv_proj`` as one tensor.
        scale: of the scores; by default one over the root of the head's size.
    """
    query_heads, kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    query = QueryHeads(query_heads, kv_heads, head_dim)
    kv = KVHeads(query_heads, kv_heads, head_dim)
    sections: tuple[tuple[str, int, Cut], ...] = (
        ("q", query_heads * head_dim, query),
        ("k", kv_heads * head_dim, kv),
        ("v", kv_heads * head_dim, kv),
    )
    q_size, hidden = query_heads * head_dim, sizes.hidden_size
    out = Part("self_attn.o_proj", hidden, Whole())
    return Attention(
        qkv=Linear(
            "self_attn.qkv_proj", Rule.QKV, _stacked("self_attn", "qkv", sections, fused), hidden, bias=qkv_bias
        ),
        out=Linear("self_attn.o_proj", Rule.ROW, (out,), q_size, query, bias=o_bias),
        num_heads=query_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        q_norm=Norm("self_attn.q_norm", head_dim, sizes.eps, unit_offset) if qk_norm else None,
        k_norm=Norm("self_attn.k_norm", head_dim, sizes.eps, unit_offset) if qk_norm else None,
    )


def gated(sizes: Sizes, activation: Activation, *, bias: bool = False, fused: bool = False) -> Gated:
    """A gated MLP; ``fused``: the source stores ``gate_up_proj`` as one tensor."""
    width, hidden = sizes.intermediate_size, sizes.hidden_size
    sections = (("gate", width, Even()), ("up", width, Even()))
    down = Part("mlp.down_proj", hidden, Whole())
    return Gated(
        gate_up=Linear(
            "mlp.gate_up_proj", Rule.MERGED_COLUMN, _stacked("mlp", "gate_up", sections, fused), hidden, bias=bias
        ),
        down=Linear("mlp.down_proj", Rule.ROW, (down,), width, Even(), bias=bias),
        activation=activation,
    )


def block(sizes: Sizes, attention: Attention, mlp: Gated) -> Block:
    """A block with one norm before attention and one before the MLP."""
    return Block(
        before_attention=Norm("input_layernorm", sizes.hidden_size, sizes.eps),
        attention=attention,
        before_mlp=Norm("post_attention_layernorm", sizes.hidden_size, sizes.eps),
        mlp=mlp,
    )


def cut_block(sizes: Sizes, mixer: Attention | Mixer, *mlp: LayerPart) -> CutBlock:
    """The same, of a layer that tpctl cuts and does not run."""
    before = Norm("input_layernorm", sizes.hidden_size, sizes.eps)
    after = Norm("post_attention_layernorm", sizes.hidden_size, sizes.eps)
    return CutBlock(mixer, (before, mixer, after, *mlp))


def model(sizes: Sizes, layers: tuple[Layer, ...]) -> Blueprint:
    """A model with one norm before its head."""
    norm = Norm("model.norm", sizes.hidden_size, sizes.eps)
    return Blueprint(sizes.vocab_size, sizes.hidden_size, layers, norm, sizes.tied)


def _stacked(where: str, name: str, sections: tuple[tuple[str, int, Cut], ...], fused: bool) -> tuple[Part, ...]:
    """Parts (label, length, cut) of a merged linear: of one source tensor, or of one each."""
    parts, offset = [], 0
    for label, length, cut in sections:
        source = f"{where}.{name}_proj" if fused else f"{where}.{label}_proj"
        parts.append(Part(source, length, cut, offset if fused else 0, label))
        offset += length
    return tuple(parts)
