"""What happens to queries and keys between their projection and attention: a norm over each head, and RoPE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable, apply_rotary


@dataclass(frozen=True)
class HeadPreparation:
    """One layer's. ``q_norm`` and ``k_norm`` are both there, or neither."""

    rotary: RotaryTable
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(
        self, qkv: Tensor, num_heads: int, num_kv_heads: int, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, N, D] and keys [T, K, D], normed and rotated, and values [T, K, D].

        Args:
            qkv: [T, (N + 2 K) * D], heads of queries, keys and values in this order.
            angles: what ``rotary`` gives for the tokens.
        """
        qkv = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
        rotated = num_heads + num_kv_heads
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :num_heads]), self.k_norm(qk[:, num_heads:])], dim=1)
        qk = apply_rotary(qk, *angles)
        return qk[:, :num_heads], qk[:, num_heads:], v
