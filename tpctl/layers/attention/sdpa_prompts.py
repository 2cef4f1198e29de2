"""Prompts in plain torch: block by block of queries, and the products and weights that decodes share with them.

A block multiplies with no key behind its last query or before its first query's window, and its scores are the largest
thing in memory, however long the context is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpctl.layers.attention.base import AttentionSpec

MOST_SCORES = 1 << 23
"""Scores in memory at once, above which fewer sequences, then fewer queries, are taken together."""

_QUERY_BLOCK = 64
"""Queries of a sequence that are multiplied at once: of 32 to 256 the fastest for 128 to 2,048 keys, by a little."""
_LEAST_QUERY_BLOCK = 16

CausalBiases = dict[tuple[int, int, AttentionSpec], Tensor]
"""Those of a step, by queries, columns and window."""


def prefill(
    q_TND: Tensor,
    k_SKLD: Tensor,
    v_SKLD: Tensor,
    spec: AttentionSpec,
    biases: CausalBiases,
    out_TND: Tensor,
    sinks_N: Tensor | None = None,
    products: torch.dtype | None = None,
) -> None:
    """The last T / S of each sequence's L tokens, each over the keys up to its own, written to ``out_TND``. Values
    may have another size than keys. ``products``: the dtype to multiply in, if it is another."""
    count, _, length, _ = k_SKLD.shape
    new = q_TND.shape[0] // count
    shape = (count, new, spec.num_kv_heads, spec.group, spec.head_dim)
    q_STKGD, out_STKGD = q_TND.view(shape), out_TND.view(*shape[:-1], -1)
    widest = spec.num_heads * length  # scores of one query at most
    size = min(new, max(_LEAST_QUERY_BLOCK, min(_QUERY_BLOCK, MOST_SCORES // widest)))
    together = max(1, MOST_SCORES // (widest * size))
    for first in range(0, count, together):
        some = slice(first, first + together)
        keys, values = (x[some].reshape(-1, length, x.shape[-1]).to(products) for x in (k_SKLD, v_SKLD))
        for start in range(0, new, size):
            stop = min(start + size, new)
            end = length - new + stop
            begin = 0 if spec.window is None else max(0, length - new + start + 1 - spec.window)
            q_SKGTD = q_STKGD[some, start:stop].permute(0, 2, 3, 1, 4)
            q = q_SKGTD.reshape(len(keys), -1, spec.head_dim).to(keys.dtype)
            scores = scores_of(None, q, keys[:, begin:end], spec)
            bias = causal_bias(stop - start, end - begin, spec, scores, biases)
            scores[:, :, -bias.shape[1] :] += bias
            sinks_SKGT = None
            if sinks_N is not None:
                sinks_SKGT = sinks_N.view(1, -1, spec.group, 1).expand(*q_SKGTD.shape[:-1])
            out = torch.bmm(softmax(scores, sinks_SKGT), values[:, begin:end])
            out_STKGD[some, start:stop] = out.view(*q_SKGTD.shape[:-1], -1).permute(0, 3, 1, 2, 4)


def causal_bias(new: int, width: int, spec: AttentionSpec, like: Tensor, biases: CausalBiases) -> Tensor:
    """[G * new, columns] to add to the last columns of a block's scores: 0 where one of ``new`` queries, the last
    of ``width`` tokens, may look, -inf elsewhere; the same for each head of a group.

    Without a window every query sees all columns before the block's own, so these need no bias.
    """
    columns = new if spec.window is None else width
    found = biases.get((new, columns, spec))
    if found is None:
        query = torch.arange(columns - new, columns, device=like.device).unsqueeze(1)
        keys = torch.arange(columns, device=like.device)
        hidden = keys > query
        if spec.window is not None:
            hidden |= keys <= query - spec.window
        found = like.new_zeros(new, columns).masked_fill_(hidden, float("-inf")).repeat(spec.group, 1)
        biases[new, columns, spec] = found
    return found


def scores_of(bias: Tensor | None, q: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
    """``q keys^T * scale``, capped, plus ``bias``, for batches of matrices."""
    if spec.softcap is None:
        beta = 0 if bias is None else 1  # with 0 the first argument is not read
        return torch.baddbmm(
            q[:1, :1, :1] if bias is None else bias, q, keys.transpose(1, 2), beta=beta, alpha=spec.scale
        )
    scores = torch.bmm(q, keys.transpose(1, 2)).mul_(spec.scale / spec.softcap).tanh_().mul_(spec.softcap)
    return scores if bias is None else scores.add_(bias)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights of scores [.., rows, L]; ``sinks``, of as many elements as there are rows, join their sums."""
    if sinks is None:
        return scores.softmax(-1)
    joined = torch.cat((scores, sinks.reshape(*scores.shape[:-1], 1)), dim=-1)
    return joined.softmax(-1)[..., :-1]
