"""Every weight of a model, by name, with the rule that cuts it.

This is where a family's tensor names meet the rules of ``partition.split``. Stored names are the fused ones that
serving engines use: ``qkv_proj`` with rows [q; k; v], ``gate_up_proj`` with rows [gate; up]. With tied embeddings the
one copy is stored as ``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator

from tpctl.arch.config import ModelConfig
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import Block, Cut, Even, KVHeads, QueryHeads, Rule, TensorSplit, Vocab, Whole

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def build_plan(config: ModelConfig, tp_size: int) -> PartitionPlan:
    """The partition plan of a model for ``tp_size`` ranks.

    Raises:
        PartitionError: the model cannot be cut into that many shards.
    """
    return PartitionPlan.build(config.geometry, tuple(weight_splits(config)), tp_size)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Names that a checkpoint may hold and the plan does not read: stored RoPE tables, a tied head's second copy."""
    layers = range(config.num_layers)
    tables = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in layers]
    return (*tables, LM_HEAD) if config.tie_word_embeddings else tuple(tables)


def weight_splits(config: ModelConfig) -> Iterator[TensorSplit]:
    """The split of every stored tensor, in the order in which a forward pass meets them."""
    hidden = config.hidden_size
    vocab = Block(EMBEDDING, config.vocab_size, Vocab())
    if not config.tie_word_embeddings:
        yield TensorSplit(EMBEDDING, Rule.VOCAB, (vocab,), other=hidden)
    for layer in range(config.num_layers):
        yield from _layer(config, f"model.layers.{layer}")
    yield _replicated("model.norm.weight", hidden)
    head = vocab if config.tie_word_embeddings else Block(LM_HEAD, config.vocab_size, Vocab())
    yield TensorSplit(LM_HEAD, Rule.VOCAB, (head,), other=hidden)


def _layer(config: ModelConfig, prefix: str) -> Iterator[TensorSplit]:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    hidden, head_dim = config.hidden_size, config.head_dim
    query = QueryHeads(config.num_heads, config.num_kv_heads, head_dim)
    kv = KVHeads(config.num_heads, config.num_kv_heads, head_dim)
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    yield _replicated(f"{prefix}.input_layernorm.weight", hidden)
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        sizes: tuple[tuple[str, int, Cut], ...] = (("q", q_size, query), ("k", kv_size, kv), ("v", kv_size, kv))
        if config.family.fused:
            source, offsets = f"{attention}.qkv_proj.{kind}", (0, q_size, q_size + kv_size)
            qkv = tuple(
                Block(source, size, cut, offset, label)
                for (label, size, cut), offset in zip(sizes, offsets, strict=True)
            )
        else:
            qkv = tuple(Block(f"{attention}.{label}_proj.{kind}", size, cut, 0, label) for label, size, cut in sizes)
        yield TensorSplit(f"{attention}.qkv_proj.{kind}", Rule.QKV, qkv, other=_other(kind, hidden))
    if config.family.qk_norm:
        yield _replicated(f"{attention}.q_norm.weight", head_dim)
        yield _replicated(f"{attention}.k_norm.weight", head_dim)
    yield from _row(f"{attention}.o_proj", Block(f"{attention}.o_proj.weight", q_size, query), hidden, config.o_bias)

    yield _replicated(f"{prefix}.post_attention_layernorm.weight", hidden)
    width = config.intermediate_size
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        if config.family.fused:
            source = f"{mlp}.gate_up_proj.{kind}"
            gate_up = (Block(source, width, Even(), 0, "gate"), Block(source, width, Even(), width, "up"))
        else:
            gate_up = (
                Block(f"{mlp}.gate_proj.{kind}", width, Even(), 0, "gate"),
                Block(f"{mlp}.up_proj.{kind}", width, Even(), 0, "up"),
            )
        yield TensorSplit(f"{mlp}.gate_up_proj.{kind}", Rule.MERGED_COLUMN, gate_up, other=_other(kind, hidden))
    yield from _row(f"{mlp}.down_proj", Block(f"{mlp}.down_proj.weight", width, Even()), hidden, config.mlp_bias)


def _row(name: str, block: Block, out_features: int, bias: bool) -> Iterator[TensorSplit]:
    """A row-parallel weight, and its bias whole on every rank: rank 0 alone adds it, once."""
    yield TensorSplit(f"{name}.weight", Rule.ROW, (block,), dim=1, other=out_features)
    if bias:
        yield _replicated(f"{name}.bias", out_features)


def _replicated(name: str, length: int) -> TensorSplit:
    return TensorSplit(name, Rule.REPLICATED, (Block(name, length, Whole()),))


def _other(kind: str, hidden: int) -> int | None:
    return hidden if kind == "weight" else None
