"""The gated delta rule (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024), in float32.

Shapes of this folder, of one rank:

    T  new tokens            N  value heads          D  dimensions of a key
    S  sequences             K  key heads            E  dimensions of a value
    C  tokens of a chunk     G  N / K                X  channels of the convolution (2 K D + N E)

A value head's state S [D, E] maps keys to values. A token decays it, corrects what it gives for the token's key towards
the token's value, by a share beta, and reads it with the token's query:

    S = exp(g) S;  S = S + k^T beta (v - k S);  o = q S

``step`` does that for one token of many sequences. ``chunks`` does it for many tokens of one sequence, a chunk at a
time (the same paper, section 3.3): with L the sum of g from the chunk's start, its corrections U [C, E] solve

    (1 + tril(beta k k^T exp(L_i - L_j), -1)) U = beta (v - exp(L) k S)

a triangular system, and the rest are products of matrices:

    o = exp(L) q S + tril(q k^T exp(L_i - L_j)) U;   S = exp(L_C) S + (exp(L_C - L) k)^T U
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk: the system costs C^2 E a head, all else C (D + E) C."""

_EPS = 1e-6


class Tokens(NamedTuple):
    """What the rule reads, in float32: ``q`` and ``k`` [T, K, D], ``v`` [T, N, E], ``g`` and ``beta`` [T, N]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def part(self, start: int, stop: int) -> Tokens:
        """Some of the tokens."""
        return Tokens(*(one[start:stop] for one in self))


def unit(x: Tensor) -> Tensor:
    """Vectors of the last axis, of length 1, in float32."""
    wide = x.float()
    return wide * (wide.square().sum(-1, keepdim=True) + _EPS).rsqrt_()


def gates(a_TN: Tensor, b_TN: Tensor, dt_bias_N: Tensor, a_log_N: Tensor) -> tuple[Tensor, Tensor]:
    """``g``, at most 0, and ``beta``, from 0 to 1, of what was projected; ``beta`` is rounded to its dtype first."""
    g_TN = -a_log_N.float().exp() * F.softplus(a_TN.float() + dt_bias_N.float())
    return g_TN, b_TN.sigmoid().float()


def step(tokens: Tokens, state_SNDE: Tensor) -> Tensor:
    """[S, N, E]: one token of each sequence; its state is changed in place."""
    count, heads, dim, width = state_SNDE.shape
    state, group = state_SNDE.view(-1, dim, width), heads // tokens.k.shape[1]
    # Both read the decayed state; what the token's own correction adds to its output is (q k) times that.
    kq = torch.stack((tokens.k, tokens.q), dim=2).repeat_interleave(group, dim=1).view(-1, 2, dim)
    state.mul_(tokens.g.exp().reshape(-1, 1, 1))
    known, read = torch.bmm(kq, state).unbind(1)
    new = (tokens.v.reshape(-1, width) - known) * tokens.beta.reshape(-1, 1)
    state.baddbmm_(kq[:, :1].transpose(1, 2), new.unsqueeze(1))
    own = (kq[:, 0] * kq[:, 1]).sum(-1, keepdim=True)
    return torch.addcmul(read, own, new).view(count, heads, width)


def chunks(tokens: Tokens, state_NDE: Tensor) -> Tensor:
    """[T, N, E]: all tokens of one sequence, in order; its state is changed in place."""
    count = len(tokens.v)
    return torch.cat([_chunk(tokens.part(at, min(at + CHUNK, count)), state_NDE) for at in range(0, count, CHUNK)])


def _chunk(tokens: Tokens, state_NDE: Tensor) -> Tensor:
    heads, dim, width = state_NDE.shape
    keys, size = tokens.k.shape[1], len(tokens.v)
    state = state_NDE.view(keys, -1, dim, width)
    q, k = (x.transpose(0, 1).unsqueeze(1) for x in (tokens.q, tokens.k))  # [K, 1, C, D]
    v, g, beta = (x.transpose(0, 1).reshape(keys, heads // keys, size, -1) for x in (tokens.v, tokens.g, tokens.beta))
    total = g.cumsum(2)  # [K, G, C, 1]
    future = torch.ones(size, size, dtype=torch.bool, device=v.device).triu_(1)
    between = (total - total.transpose(2, 3)).masked_fill_(future, float("-inf")).exp_()  # [K, G, C, C]
    since, left = total.exp(), (total[:, :, -1:] - total).exp()
    system = (k @ k.transpose(2, 3)) * between * beta
    known = beta * (v - since * (k @ state))
    new = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    out: Tensor = since * (q @ state) + ((q @ k.transpose(2, 3)) * between) @ new
    state.mul_(since[:, :, -1:]).add_((k * left).transpose(2, 3) @ new)
    return out.reshape(heads, size, width).transpose(0, 1)
