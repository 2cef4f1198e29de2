"""Simulated ranks: what the shards of a plan compute, concatenated or summed, equals the whole layer.

Shapes: T tokens, H hidden, Q/K query and KV heads, D head size, I intermediate, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.described import described
from tests.unit.attending import Array, attend
from tests.unit.synthetic import make_config
from tpctl.arch.blueprint import EMBEDDING, LM_HEAD
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.partition.cuts import split_heads
from tpctl.partition.plan import PartitionPlan

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def make(seed: int, tp: int, **changes: Any) -> tuple[SimpleNamespace, PartitionPlan, dict[str, Array]]:
    """A model, its plan and random source weights."""
    config = ModelConfig.from_dict(make_config(num_hidden_layers=1, **changes))
    plan = build_plan(config, tp)
    rng = np.random.default_rng(seed)
    return described(config), plan, {name: rng.standard_normal(shape) for name, shape in plan.source_shapes.items()}


def stored(plan: PartitionPlan, weights: dict[str, Array], rank: int, name: str) -> Array:
    """Assemble a stored tensor of one rank from the source weights."""
    tensor = plan.shards[rank][name]
    out = np.zeros(tensor.shape)
    for piece in tensor.pieces:
        source = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
        target = tuple(slice(a, a + n) for a, n in zip(piece.at, piece.shape, strict=True))
        out[target] = weights[piece.source][source]
    return out


def qkv_sources(config: SimpleNamespace, weights: dict[str, Array], kind: str) -> list[Array]:
    """The whole q, k and v, from separate or fused source tensors."""
    sizes = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    if config.fused:
        return np.split(weights[f"{ATTENTION}.qkv_proj.{kind}"], np.cumsum(sizes)[:2])
    return [weights[f"{ATTENTION}.{label}_proj.{kind}"] for label in "qkv"]


def whole_attention(config: SimpleNamespace, weights: dict[str, Array], x: Array, bias: bool) -> Array:
    outs = [x @ w.T for w in qkv_sources(config, weights, "weight")]
    if bias:
        outs = [o + b for o, b in zip(outs, qkv_sources(config, weights, "bias"), strict=True)]
    q, k, v = (out.reshape(len(x), -1, config.head_dim) for out in outs)
    out = attend(q, k, v) @ weights[f"{ATTENTION}.o_proj.weight"].T
    return out + weights[f"{ATTENTION}.o_proj.bias"] if config.o_bias else out


def rank_attention(
    config: SimpleNamespace, plan: PartitionPlan, weights: dict[str, Array], x: Array, rank: int, bias: bool
) -> Array:
    """One rank's partial sum; the row-parallel bias is added by rank 0 alone."""
    share = split_heads(config.num_heads, config.num_kv_heads, plan.tp_size)[rank]
    sizes = [len(share.query) * config.head_dim] + [len(share.kv) * config.head_dim] * 2
    out = x @ stored(plan, weights, rank, f"{ATTENTION}.qkv_proj.weight").T
    if bias:
        out = out + stored(plan, weights, rank, f"{ATTENTION}.qkv_proj.bias")
    q, k, v = (one.reshape(len(x), -1, config.head_dim) for one in np.split(out, np.cumsum(sizes)[:2], axis=1))
    partial = attend(q, k, v) @ stored(plan, weights, rank, f"{ATTENTION}.o_proj.weight").T
    if config.o_bias and rank == 0:
        partial = partial + stored(plan, weights, rank, f"{ATTENTION}.o_proj.bias")
    return partial


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    kv, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "seed": draw(st.integers(0, 99)),
        "tp": draw(st.integers(1, kv * group)),
        "family": draw(st.sampled_from(["llama", "qwen2", "phi3"])),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "attention_bias": draw(st.booleans()),
    }


@settings(max_examples=50, deadline=None)
@given(options=attentions())
def test_attention_of_all_ranks_sums_to_the_whole(options: dict[str, Any]) -> None:
    check_attention(**options)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_nine_query_and_three_kv_heads(tp: int, bias: bool) -> None:
    check_attention(0, tp, num_attention_heads=9, num_key_value_heads=3, attention_bias=bias)


def check_attention(seed: int, tp: int, **changes: Any) -> None:
    config, plan, weights = make(seed, tp, **changes)
    x = np.random.default_rng(seed + 1).standard_normal((5, config.hidden_size))
    bias = config.qkv_bias
    total = sum(rank_attention(config, plan, weights, x, rank, bias) for rank in range(tp))
    np.testing.assert_allclose(total, whole_attention(config, weights, x, bias), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 99),
    tp=st.integers(1, 8),
    width=st.integers(8, 100),
    family=st.sampled_from(["llama", "phi3"]),
    bias=st.booleans(),
)
def test_mlp_of_all_ranks_sums_to_the_whole(seed: int, tp: int, width: int, family: str, bias: bool) -> None:
    config, plan, weights = make(seed, tp, family=family, intermediate_size=width, mlp_bias=bias, num_attention_heads=8)
    x = np.random.default_rng(seed + 1).standard_normal((3, config.hidden_size))

    def mlp(gate_up_w: Array, gate_up_b: Array | None, down_w: Array, down_b: Array | None) -> Array:
        out = x @ gate_up_w.T + (0 if gate_up_b is None else gate_up_b)
        gate, up = np.split(out, 2, axis=1)
        return (gate / (1 + np.exp(-gate)) * up) @ down_w.T + (0 if down_b is None else down_b)

    def source(kind: str) -> Array:
        if config.fused:
            return weights[f"{MLP}.gate_up_proj.{kind}"]
        return np.concatenate([weights[f"{MLP}.gate_proj.{kind}"], weights[f"{MLP}.up_proj.{kind}"]])

    has_bias = config.mlp_bias
    whole = mlp(
        source("weight"),
        source("bias") if has_bias else None,
        weights[f"{MLP}.down_proj.weight"],
        weights[f"{MLP}.down_proj.bias"] if has_bias else None,
    )
    total = np.zeros_like(whole)
    for rank in range(tp):
        total += mlp(
            stored(plan, weights, rank, f"{MLP}.gate_up_proj.weight"),
            stored(plan, weights, rank, f"{MLP}.gate_up_proj.bias") if has_bias else None,
            stored(plan, weights, rank, f"{MLP}.down_proj.weight"),
            stored(plan, weights, rank, f"{MLP}.down_proj.bias") if has_bias and rank == 0 else None,
        )
    np.testing.assert_allclose(total, whole, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), tp=st.integers(1, 8), vocab=st.integers(1, 300), tied=st.booleans())
def test_embedding_sums_and_logits_concatenate_over_the_padded_vocabulary(
    seed: int, tp: int, vocab: int, tied: bool
) -> None:
    config, plan, weights = make(seed, tp, vocab_size=vocab, tie_word_embeddings=tied, num_attention_heads=8)
    table = LM_HEAD if tied else EMBEDDING
    head = weights[EMBEDDING if tied else LM_HEAD]
    tokens = np.random.default_rng(seed).integers(0, vocab, 6)
    x = np.random.default_rng(seed + 1).standard_normal((4, config.hidden_size))
    embedded, logits, first = np.zeros((6, config.hidden_size)), [], 0
    for rank in range(tp):
        rows = stored(plan, weights, rank, table)
        mine = (tokens >= first) & (tokens < first + len(rows))
        embedded[mine] += rows[tokens[mine] - first]
        logits.append(x @ stored(plan, weights, rank, LM_HEAD).T)
        first += len(rows)
    np.testing.assert_array_equal(embedded, weights[EMBEDDING][tokens])
    joined = np.concatenate(logits, axis=1)
    assert joined.shape[1] == first == -(-vocab // 64) * 64
    np.testing.assert_allclose(joined[:, :vocab], x @ head.T)
    assert (joined[:, vocab:] == 0).all()
