"""What happens to queries and keys between their projection and attention: norms, and RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.layers.norm import RMSNorm, rms_norm, scaled
from tpctl.layers.rotary import RotaryTable, apply_rotary


@dataclass(frozen=True)
class RanksSums:
    """What norms over the heads of all ranks need beyond a rank's own: sums of squares, two numbers a token.

    Attributes:
        q_size, k_size: elements that the model's query heads and KV heads have, each counted once.
        counts_keys: whether this rank counts its KV heads; of ranks that hold the same one the first does.
    """

    group: TPGroup
    q_size: int
    k_size: int
    counts_keys: bool

    def of(self, q_TND: Tensor, k_TKD: Tensor) -> Tensor:
        """float32 [T, 2]: the sums of squares of a token's queries and keys, of all ranks (collective)."""
        sums = torch.stack([q_TND.float().square().sum((1, 2)), k_TKD.float().square().sum((1, 2))], dim=1)
        if not self.counts_keys:
            sums[:, 1] = 0
        return self.over_ranks(sums)

    def over_ranks(self, sums_T2: Tensor) -> Tensor:
        """The same, from this rank's own sums."""
        return self.group.all_reduce(sums_T2)


@dataclass(frozen=True)
class HeadPreparation:
    """One layer's.

    Attributes:
        rotary: ``None``: heads are not rotated.
        q_norm, k_norm: both are there, or neither. Over each head, with weights [D]; or, with ``over_all``, over those
            of all ranks at once, with weights [N * D] and [K * D].
        value_eps: as of ``arch.block.Attention``.
        held: what there is of queries, keys and values; keys that serve as values do so as they are projected.
        gated: each query head is followed by a gate of its own, by whose sigmoid its output is multiplied.
    """

    rotary: RotaryTable | None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    over_all: RanksSums | None = None
    value_eps: float | None = None
    held: str = "qkv"
    gated: bool = False

    @cached_property
    def of_kernels(self) -> dict[str, Any]:
        """What ``kernels.attention.rope_cache`` takes of it."""
        rotary, q_norm, k_norm = self.rotary, self.q_norm, self.k_norm
        return {
            "cos_sin": None if rotary is None else (rotary.cos, rotary.sin),
            "q_norm": None if q_norm is None else q_norm.weight,
            "k_norm": None if k_norm is None else k_norm.weight,
            "eps": 1e-6 if q_norm is None else q_norm.eps,
            "unit_offset": q_norm is not None and q_norm.unit_offset,
            "interleaved": rotary is not None and rotary.interleaved,
            "growth": None if rotary is None else rotary.growths,
            "value_eps": self.value_eps,
            "held": self.held,
            "gated": self.gated,
        }

    def queries(self, q: Tensor, num_heads: int, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries alone, [T, N * D] -> [T, N, D], normed and rotated."""
        q_TND = q.view(q.shape[0], num_heads, -1)
        if self.q_norm is not None:
            q_TND = self.q_norm(q_TND)
        if self.rotary is not None and angles is not None:
            q_TND = apply_rotary(q_TND, *angles, interleaved=self.rotary.interleaved)
        return q_TND

    def __call__(
        self, qkv: Tensor, num_heads: int, num_kv_heads: int, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, N, D] and keys [T, K, D], normed and rotated, and values [T, K, D].

        Args:
            qkv: [T, (N + 2 K) * D], heads of queries, keys and values in this order; of values none, where keys are.
            angles: what ``rotary`` gives for the tokens.
        """
        qkv = qkv.view(qkv.shape[0], num_heads + (len(self.held) - 1) * num_kv_heads, -1)
        qk, v = qkv[:, : num_heads + num_kv_heads], qkv[:, -num_kv_heads:]
        if self.value_eps is not None:
            v = rms_norm(v, None, self.value_eps)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat(self._normed(qk[:, :num_heads], qk[:, num_heads:], self.q_norm, self.k_norm), dim=1)
        if self.rotary is not None and angles is not None:
            qk = apply_rotary(qk, *angles, interleaved=self.rotary.interleaved)
        return qk[:, :num_heads], qk[:, num_heads:], v

    def _normed(self, q_TND: Tensor, k_TKD: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> list[Tensor]:
        if self.over_all is None:
            return [q_norm(q_TND), k_norm(k_TKD)]
        sums_T2 = self.over_all.of(q_TND, k_TKD)
        return [
            _by_sum(q_TND, sums_T2[:, 0], self.over_all.q_size, q_norm),
            _by_sum(k_TKD, sums_T2[:, 1], self.over_all.k_size, k_norm),
        ]


def without_gates(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """[T, (2 N + 2 K) * D], where each query head is followed by its gate -> [T, (N + 2 K) * D], gates [T, N * D]."""
    head_dim = qkv.shape[1] // (2 * num_heads + 2 * num_kv_heads)
    queries = qkv[:, : 2 * num_heads * head_dim].view(-1, num_heads, 2, head_dim)
    rest = qkv[:, 2 * num_heads * head_dim :]
    return torch.cat((queries[:, :, 0].flatten(1), rest), dim=1), queries[:, :, 1].flatten(1)


def _by_sum(x_THD: Tensor, sums_T: Tensor, size: int, norm: RMSNorm) -> Tensor:
    """Heads normed by the sum of squares of ``size`` elements."""
    scale_T = (sums_T / size + norm.eps).rsqrt()
    weight = norm.weight.view(x_THD.shape[1:])
    return scaled(x_THD, scale_T[:, None, None], weight, unit_offset=norm.unit_offset, once=norm.once)
