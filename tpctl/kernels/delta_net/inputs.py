"""What the kernels for gated delta nets read: a layer's projections, weights and states. Letters of this folder:

    T  new tokens            N  value heads          D  dimensions of a key
    S  sequences             K  key heads            E  dimensions of a value
    C  chunks                G  N / K                X  channels of the convolution (2 K D + N E)
    P  taps                                          L  tokens of a chunk

A state's last inputs of the convolution are kept in P rows, that of the token at position p in row p % P. Of these the
newest P - 1 mean something: a step writes the one that no program reads in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class NetShape(NamedTuple):
    """Heads of one rank, their dimensions, and taps of the convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """X."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Projected:
    """What is projected of T tokens, in the model's dtype: views [T, ..], whose rows may lie anywhere.

    Of each, what belongs to a key head lies together: ``q`` and ``k`` [D], ``v`` and ``z`` [G * E], ``b`` and ``a``
    [G]. That of the next key head is ``key_step``, ``v_step``, ``z_step`` or ``gate_step`` numbers behind it. ``q``,
    ``k`` and ``v`` have rows of one stride, and ``b`` and ``a``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    z: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    key_step: int
    v_step: int
    z_step: int
    gate_step: int

    def __post_init__(self) -> None:
        strides = [one.stride(0) for one in (self.q, self.k, self.v)]
        assert len(set(strides)) == 1 and self.b.stride(0) == self.a.stride(0), "rows of one stride"
        assert len({one.untyped_storage().data_ptr() for one in (self.q, self.k, self.v)}) == 1, "of one linear"

    def rows(self, some: slice) -> Projected:
        """Some of the tokens."""
        names = ("q", "k", "v", "z", "b", "a")
        return replace(self, **{name: getattr(self, name)[some] for name in names})

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        return iter((self.q, self.k, self.v, self.z, self.b, self.a))

    @property
    def qk_step(self) -> int:
        """How far a token's keys are behind its queries."""
        return int(self.k.storage_offset() - self.q.storage_offset())

    @property
    def qv_step(self) -> int:
        """How far its values are behind them."""
        return int(self.v.storage_offset() - self.q.storage_offset())

    @property
    def steps(self) -> tuple[int, int, int, int]:
        return self.key_step, self.v_step, self.z_step, self.gate_step

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the rows of ``q``, ``k`` and ``v``, of ``z``, and of ``b`` and ``a``."""
        return self.q.stride(0), self.z.stride(0), self.b.stride(0)


class NetWeights(NamedTuple):
    """Weights beside the projections: ``taps`` [P, X], ``dt_bias`` and ``a_log`` [N], all float32; ``norm`` [E]."""

    taps: torch.Tensor
    dt_bias: torch.Tensor
    a_log: torch.Tensor
    norm: torch.Tensor
    eps: float


class NetState(NamedTuple):
    """Slots for states: ``matrices`` [slots, N, D, E], float32, and ``inputs`` [slots, P, X]; contiguous."""

    matrices: torch.Tensor
    inputs: torch.Tensor


def constants(shape: NetShape) -> dict[str, Any]:
    """What kernels are compiled for."""
    return {
        "KEYS": shape.key_heads,
        "GROUP": shape.group,
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "TAPS": shape.taps,
    }


@triton.jit
def head_gates(a, b, dt_bias, a_log):
    """g and beta of float32 a, and of b in its own dtype, to which beta is rounded."""
    x = a + dt_bias
    soft = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    beta = 1.0 / (1.0 + tl.exp(-b.to(tl.float32)))
    return -tl.exp(a_log) * soft, beta.to(b.dtype).to(tl.float32)


@triton.jit
def silu_rounded(x, dtype: tl.constexpr):
    """silu of x rounded to ``dtype``, rounded to it again; in float32."""
    x = x.to(dtype).to(tl.float32)
    return (x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32)
