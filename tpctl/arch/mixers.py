"""What mixes tokens in models that tpctl cuts and does not run: attention with something beyond Llama's, and MLA."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import Mixer
from tpctl.arch.family import Sizes
from tpctl.arch.linear import Linear, Norm
from tpctl.arch.mixture import whole
from tpctl.partition.cuts import QueryHeads, Whole
from tpctl.partition.split import Part, Rule


def grouped(sizes: Sizes, kind: str) -> Mixer:
    """Grouped-query attention; ``kind``: what people call it."""
    qkv, out = parts.projections(sizes)
    return Mixer(kind, (qkv, out), sizes.num_heads, sizes.num_kv_heads, kept=2 * sizes.head_dim)


def latent(
    sizes: Sizes,
    *,
    q_rank: int | None,
    kv_rank: int,
    nope: int,
    rope: int,
    value: int,
    bias: bool = False,
) -> Mixer:
    """Multi-head latent attention (MLA): all heads' keys and values are made of one latent vector a token.

    What makes the latent vectors is on every rank, and so is their cache; what makes heads of them is cut by head.

    Args:
        q_rank, kv_rank: sizes of the latent vectors; without the first, queries are made of the hidden state.
        nope, rope: dimensions of a query or key head, those without and those with RoPE; ``value``: of a value head.
        bias: of what makes the latent vectors, and of the output.
    """
    num_heads, hidden = sizes.num_heads, sizes.hidden_size

    def by_head(name: str, rows: int, inputs: int) -> Linear:
        cut = QueryHeads(num_heads, 1, rows)
        return Linear(f"self_attn.{name}", Rule.COLUMN, (Part(f"self_attn.{name}", num_heads * rows, cut),), inputs)

    if q_rank is None:
        queries: tuple[Linear | Norm, ...] = (by_head("q_proj", nope + rope, hidden),)
    else:
        queries = (
            whole("self_attn.q_a_proj", hidden, q_rank, bias),
            Norm("self_attn.q_a_layernorm", q_rank, sizes.eps),
            by_head("q_b_proj", nope + rope, q_rank),
        )
    out = Part("self_attn.o_proj", hidden, Whole())
    return Mixer(
        "latent attention (MLA)",
        (
            *queries,
            whole("self_attn.kv_a_proj_with_mqa", hidden, kv_rank + rope, bias),
            Norm("self_attn.kv_a_layernorm", kv_rank, sizes.eps),
            by_head("kv_b_proj", nope + value, kv_rank),
            Linear("self_attn.o_proj", Rule.ROW, (out,), num_heads * value, QueryHeads(num_heads, 1, value), bias=bias),
        ),
        num_heads,
        num_kv_heads=0,
        kept=kv_rank + rope,
    )
