"""``kv_b``, which makes heads of a latent vector, in both of its uses (DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1).

With c the latent vector of a token, W_k and W_v the rows of ``kv_b`` that are one head's, the score of a query q is
q . (W_k c), and its output the sum of p (W_v c) over the tokens. So there are two ways:

    plain     make W_k c and W_v c for every token, then attend with heads of usual size
    absorbed  (W_k^T q) . c, and W_v (sum of p c): attend over the latent vectors themselves, and make nothing of them

They differ by rounding alone. With R for the rank, P, Q and V for a head's dimensions without RoPE, with it, and of a
value, a head's plain way multiplies P + Q + V times a query and key, and R (P + V) times a key; its absorbed way
2 R + Q times a query and key, and R (P + V) times a query: better for few queries over many keys.

Letters: S sequences or tokens, L keys, N heads of this rank, R, P, Q, V as above.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.arch.held import HeldLinear
from tpctl.arch.latent import LatentSizes
from tpctl.layers.instructions import bmm, product_dtype
from tpctl.layers.linear import NumbersLinear
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable, apply_rotary


@dataclass(frozen=True)
class LatentPreparation:
    """What happens to queries, latent vectors and the shared key between their projections and attention."""

    sizes: LatentSizes
    norm: RMSNorm
    rotary: RotaryTable

    def __call__(self, q: Tensor, kept_TC: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [T, N, P + Q], rotated, and what the cache keeps, [T, 1, R + Q]; of what is projected, [T, N * (P +
        Q)] and [T, R + Q]. angles: what ``rotary`` gives for the tokens."""
        one = self.sizes
        q_TND = q.view(len(q), -1, one.key)
        q_TND = torch.cat((q_TND[..., : one.nope], self._rotated(q_TND[..., one.nope :], angles)), dim=-1)
        latent_TR, shared_TQ = torch.split(kept_TC, [one.kv_rank, one.rope], dim=-1)
        shared_T1Q = self._rotated(shared_TQ.unsqueeze(1), angles)
        return q_TND, torch.cat((self.norm(latent_TR).unsqueeze(1), shared_T1Q), dim=-1)

    def _rotated(self, x_TND: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rotary(x_TND, *angles, interleaved=self.rotary.interleaved)


class LatentUp(NumbersLinear):
    """``kv_b`` of this rank's heads, [N * (P + V), R]; of a quantised one the numbers are made once, when it is loaded
    (``arch.growth``)."""

    def __init__(self, held: HeldLinear, sizes: LatentSizes, dtype: torch.dtype | None = None) -> None:
        super().__init__(held, dtype)
        self.sizes = sizes

    @property
    def num_heads(self) -> int:
        return self.out_features // (self.sizes.nope + self.sizes.value)

    def absorbs(self, *prompts: tuple[int, int]) -> bool:
        """Whether ``prompts``, of each how many queries at the end of how many keys, take fewer products absorbed."""
        one = self.sizes
        pairs = sum(new * (length - new) + new * (new + 1) // 2 for new, length in prompts)
        queries, keys = (sum(counts) for counts in zip(*prompts, strict=True))
        each = one.kv_rank * (one.nope + one.value)
        absorbed = pairs * (2 * one.kv_rank + one.rope) + queries * each
        return bool(absorbed < pairs * (one.nope + one.rope + one.value) + keys * each)

    def absorb(self, q_SND: Tensor) -> Tensor:
        """Queries [S, N, P + Q], rotated -> [S, N, R + Q], whose products with what the cache keeps are the scores."""
        q_SNP, q_SNQ = torch.split(q_SND, [self.sizes.nope, self.sizes.rope], dim=-1)
        q_NSR = bmm(q_SNP.transpose(0, 1), self._heads[:, : self.sizes.nope])
        return torch.cat((q_NSR.transpose(0, 1), q_SNQ), dim=-1)

    def values(self, sums_SNR: Tensor) -> Tensor:
        """Weighted sums of latent vectors [S, N, R] -> those of values, [S, N, V]."""
        values_NRV = self._heads[:, self.sizes.nope :].transpose(1, 2)
        return bmm(sums_SNR.transpose(0, 1), values_NRV).transpose(0, 1)

    def expand(self, kept_SLC: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys [S, n, L, P + Q] and values [S, n, L, V] of some heads, of what the cache keeps, [S, L, R + Q]."""
        one = self.sizes
        latents_SLR, shared_SLQ = torch.split(kept_SLC, [one.kv_rank, one.rope], dim=-1)
        weights = self._heads[heads]
        dtype = product_dtype(weights.dtype, weights.device)
        both = F.linear(latents_SLR.to(dtype), weights.flatten(0, 1).to(dtype))
        both = both.view(*both.shape[:2], len(weights), one.nope + one.value).transpose(1, 2)
        keys = both.new_empty(*both.shape[:3], one.key)
        keys[..., : one.nope] = both[..., : one.nope]
        keys[..., one.nope :] = shared_SLQ.unsqueeze(1)
        return keys, both[..., one.nope :]

    @property
    def _heads(self) -> Tensor:
        """[N, P + V, R]."""
        return self.weight.view(self.num_heads, -1, self.sizes.kv_rank)
