"""What an engine's steps take of a GPU beside weights and KV cache, by the formulas that it reserves them by.

The largest step is estimated (``ModelSizes.activation_bytes``), where an engine runs it and looks.
"""

from __future__ import annotations

from tpctl.accounting import (
    captured_bytes,
    captured_rows,
    net_chunk_bytes,
    prefix_bytes,
    sampled_rows,
    sampler_bytes,
    short_rows,
    table_bytes,
)
from tpctl.arch.block import Attention
from tpctl.arch.delta_net import state_sizes
from tpctl.attention_choice import KINDS
from tpctl.partition.plan import PartitionPlan
from tpctl.planning.model_sizes import ModelSizes, keeps


def steps_bytes(model: ModelSizes, plan: PartitionPlan, rank: int, tokens: int, seqs: int, longest: int) -> int:
    """All that steps take on ``rank`` of ``plan``, a small one: of ``tokens``, of ``seqs`` sequences of up to
    ``longest``, captured where they can be, as ``tpctl serve`` runs them."""
    largest = model.activation_bytes(plan, rank, tokens, seqs, longest)
    unpacked = model.unpacked_bytes(plan.tp_size, rank, tokens, longest)
    return largest + unpacked + later_bytes(model, plan, rank, largest, tokens, seqs, longest)


def later_bytes(
    model: ModelSizes, plan: PartitionPlan, rank: int, largest: int, tokens: int, seqs: int, longest: int
) -> int:
    """What is taken behind the largest step, whose activations take ``largest``: by captured steps together, block
    tables, prefixes that decodes share, and sampling, with the host's help too."""
    tp_size, vocab = plan.tp_size, plan.shape(rank, model.config.blueprint.head)[0]
    rows, logits = captured_rows(seqs, short_rows(tokens)), sampled_rows(seqs) * vocab * model.itemsize
    nets = state_sizes(model.config.blueprint, rank, tp_size)
    sizes = ((net.key_heads, net.value_heads, net.key_dim, net.value_dim) for net in nets)
    chunk = max((net_chunk_bytes(*size, model.itemsize) for size in sizes), default=0)
    width = -(-longest // KINDS[model.choice.backend].block_size)
    captured = captured_bytes(largest, tokens, rows, logits, tp_size, chunk)
    tables = table_bytes(seqs, rows, width, model.kv_pools(tp_size, longest))
    sampled = logits + sampler_bytes(seqs, tp_size * min(vocab, model.config.vocab_size))  # which leaves padding out
    return captured + tables + _prefixes(model, tp_size, rank, seqs) + sampled


def _prefixes(model: ModelSizes, tp_size: int, rank: int, seqs: int) -> int:
    """What decodes find in prefixes that they share, where layers can look there once for all."""
    found = [mixer for mixer in model.mixers if isinstance(mixer, Attention) and keeps(mixer)]
    if model.choice.backend != "triton" or all(mixer.window or mixer.sinks is not None for mixer in found):
        return 0
    kinds = {(mixer.num_heads, mixer.num_kv_heads): mixer for mixer in found}.values()
    heads = max(len(mixer.shares(tp_size)[rank].query) for mixer in kinds)
    return prefix_bytes(seqs, heads, max(mixer.head_dim for mixer in found))
