"""Multi-head latent attention (MLA; DeepSeek-AI, "DeepSeek-V2", 2024), as data: all heads' keys and values are made of
one latent vector a token.

    x ─┬─ q_a ── norm ── q_b ───────────── heads of [nope | rope]        without a rank for queries: x ── q
       └─ kv_a ─┬─ norm ── latent ── kv_b ─ heads of [nope | value]
                └─ one key of [rope], which all heads share

What makes the latent vectors is on every rank, and so is their cache; what makes heads of them is cut by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tpctl.arch.block import Attention, Mixer
from tpctl.arch.linear import Linear, Norm
from tpctl.arch.rope import RopeConfig, yarn_scale
from tpctl.partition.cuts import QueryHeads, Whole
from tpctl.partition.split import Part, Rule

EPS = 1e-6
"""Of the norms of latent vectors, whatever a config says of the others: transformers leaves it at its class's own."""


@dataclass(frozen=True)
class LatentSizes:
    """``q_rank``, ``kv_rank``: of the latent vectors; without the first, queries are made of the hidden state.
    ``nope``, ``rope``: dimensions of a query or key head, those without and those with RoPE. ``value``: of a value
    head."""

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int

    @property
    def key(self) -> int:
        """Dimensions of a query or key head."""
        return self.nope + self.rope

    @property
    def kept(self) -> int:
        """Numbers that the cache keeps of a token: the latent vector, normed, and the shared key, rotated."""
        return self.kv_rank + self.rope

    @property
    def made(self) -> int:
        """Numbers that a head makes of a latent vector: a key without RoPE, and a value."""
        return self.nope + self.value


@dataclass(frozen=True, kw_only=True)
class LatentAttention(Mixer):
    """Latent attention, which runs. Its parts are in the order of a forward pass; what reads the hidden state may be
    one linear, stored below each other (vLLM's form)."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    window: ClassVar[None] = None
    reads: ClassVar[None] = None
    rotates_part: ClassVar[bool] = True

    sizes: LatentSizes
    rope: RopeConfig
    scale: float
    """Of the scores, before the softmax."""

    @property
    def down(self) -> tuple[Linear, ...]:
        """What makes latent vectors: below each other [q_rank; kv_rank; rope], the first where there is one."""
        return self._of(Rule.REPLICATED)

    @property
    def queries(self) -> Linear:
        return self._of(Rule.COLUMN)[0]

    @property
    def kv_b(self) -> Linear:
        """[N * (nope + value), kv_rank]."""
        return self._of(Rule.COLUMN)[1]

    @property
    def out(self) -> Linear:
        (found,) = self._of(Rule.ROW)
        return found

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Of the queries' latent vector, where there is one, and of that of keys and values."""
        return tuple(one for one in self.parts if isinstance(one, Norm))

    def _of(self, rule: Rule) -> tuple[Linear, ...]:
        return tuple(one for one in self.parts if isinstance(one, Linear) and one.rule is rule)


Attending = Attention | LatentAttention
"""What keeps something of every token in blocks, and runs."""


def latent(hidden: int, num_heads: int, of: LatentSizes, rope: RopeConfig, *, bias: bool = False) -> LatentAttention:
    """Latent attention under the names of DeepSeek's weights; ``bias``: of what makes the latent vectors, and of the
    output."""

    def by_head(name: str, rows: int, inputs: int) -> Linear:
        cut = QueryHeads(num_heads, 1, rows)
        return Linear(f"self_attn.{name}", Rule.COLUMN, (Part(f"self_attn.{name}", num_heads * rows, cut),), inputs)

    def whole(name: str, outputs: int) -> Linear:
        part = Part(f"self_attn.{name}", outputs, Whole())
        return Linear(f"self_attn.{name}", Rule.REPLICATED, (part,), hidden, bias=bias)

    if of.q_rank is None:
        queries: tuple[Linear | Norm, ...] = (by_head("q_proj", of.key, hidden),)
    else:
        queries = (
            whole("q_a_proj", of.q_rank),
            Norm("self_attn.q_a_layernorm", of.q_rank, EPS),
            by_head("q_b_proj", of.key, of.q_rank),
        )
    heads = QueryHeads(num_heads, 1, of.value)
    out = Part("self_attn.o_proj", hidden, Whole())
    return LatentAttention(
        "latent attention (MLA)",
        (
            *queries,
            whole("kv_a_proj_with_mqa", of.kept),
            Norm("self_attn.kv_a_layernorm", of.kv_rank, EPS),
            by_head("kv_b_proj", of.nope + of.value, of.kv_rank),
            Linear("self_attn.o_proj", Rule.ROW, (out,), num_heads * of.value, heads, bias=bias),
        ),
        num_heads,
        num_kv_heads=0,
        kept=of.kept,
        sizes=of,
        rope=rope,
        scale=softmax_scale(rope, of.key),
    )


def softmax_scale(rope: RopeConfig, key: int) -> float:
    """One over the root of the size of a key; of a context stretched by YaRN times the square of its mscale, which
    here is in the scores and not in RoPE's table alone (``mscale_all_dim``, as in DeepSeek's own code)."""
    all_dim = rope.params.get("mscale_all_dim") if rope.kind == "yarn" else None
    mscale = yarn_scale(float(rope.params["factor"]), float(all_dim)) if all_dim else 1.0
    return float(key**-0.5 * mscale * mscale)
