"""Weights as they are stored, multiplied on a GPU by whichever kernel is fastest for the rows there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.arch.block import Activation
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.activation import act_and_mul
from tpctl.kernels.common.launch import is_hopper, num_multiprocessors
from tpctl.kernels.common.norm import rms_norm
from tpctl.kernels.linear.gated_linear import gated_linear, pick_gated
from tpctl.kernels.linear.gemv import GemvConfig, GemvScratch, few_rows, pick, small_linear
from tpctl.kernels.linear.split_linear import pick_splits, split_linear
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.dense import DenseWeight


@dataclass(frozen=True)
class GpuFacts:
    """What decides which kernel a linear gets.

    Attributes:
        hopper: whether choices between ways were measured on this generation.
        few_rows: most rows that the GEMV kernels are for; beyond, cuBLAS does the rest.
        wide: the kernels take float32 as well, which cuBLAS multiplies faster.
    """

    hopper: bool
    multiprocessors: int
    few_rows: int
    wide: bool = False

    @classmethod
    def of(cls, device: torch.device) -> GpuFacts:
        return cls(is_hopper(device), num_multiprocessors(device), few_rows(device))

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels for linears are used for this dtype."""
        return self.wide or x.dtype != torch.float32


@dataclass
class StepState:
    """What holds for all kernels of a step.

    Attributes:
        pdl: launch kernels early.
        sums: the peer memory that sums over the ranks go through; ``None``: they go through NCCL, or there are none.
        sends: linears send their partial sums to ``sums`` themselves.
    """

    pdl: bool = False
    sums: PeerBuffer | None = None
    sends: bool = False


class KernelWeight(DenseWeight):
    """W [out, in] on a GPU.

    Args:
        split: partial sums are added over several ranks.
    """

    def __init__(
        self, weight: Tensor, scratch: GemvScratch, state: StepState, facts: GpuFacts, *, split: bool = False
    ) -> None:
        super().__init__(weight)
        self._scratch, self._state, self._facts, self._split = scratch, state, facts, split

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        return self._linear(x, bias, norm, None)

    def gated(self, x: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None = None) -> Tensor:
        x, norm = self._norm_apart(x, norm)
        state, rows, width = self._state, x.shape[0], self.weight.shape[0] // 2
        if bias is None and self._facts.takes(x):
            config = pick(rows, width, x.shape[1], gated=True, most=self._facts.few_rows, itemsize=x.itemsize)
            if config is not None:
                return small_linear(
                    x, self.weight, self._scratch, **fused(norm), activation=activation, config=config, pdl=state.pdl
                )
            cut = pick_gated(rows, width, x.shape[1], self._facts.multiprocessors, x.itemsize)
            if cut is not None and norm is None and self._facts.hopper:
                return gated_linear(x, self.weight, cut, activation=activation, pdl=state.pdl)
        return act_and_mul(self._linear(x, bias, norm, None), activation=activation, pdl=state.pdl)

    def runs(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        if bias is None and norm is None and self._facts.takes(x) and self._facts.hopper:
            splits = pick_splits(x.shape[0], self.weight.shape[0], self.weight.shape[1])
            if splits > 1:
                return split_linear(x, self.weight, splits)
        return self._linear(x, bias, norm, None)

    def partial(self, x: Tensor, bias: Tensor | None) -> Tensor:
        state = self._state
        if state.sends or (self._split and state.sums is None):  # NCCL takes no runs
            return self._linear(x, bias, None, state.sums)
        return self.runs(x, bias)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> None:
        config = self._config(x)
        if config is None:
            residual.add_(F.linear(x, self.weight, bias))
            return
        small_linear(
            x,
            self.weight,
            self._scratch,
            bias_O=bias,
            residual_TO=residual,
            out=residual,
            config=config,
            pdl=self._state.pdl,
        )

    def _linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, outlet: PeerBuffer | None) -> Tensor:
        """One launch for few rows, which can send the result to the peers as well."""
        x, norm = self._norm_apart(x, norm)
        config = self._config(x)
        if config is None:
            assert outlet is None, "nobody would send what the all-reduce takes for sent"
            return F.linear(x if norm is None else normed(x, norm, self._state), self.weight, bias)
        return small_linear(
            x,
            self.weight,
            self._scratch,
            bias_O=bias,
            **fused(norm),
            config=config,
            outlet=outlet,
            pdl=self._state.pdl,
        )

    def _config(self, x: Tensor) -> GemvConfig | None:
        if not self._facts.takes(x):
            return None
        return pick(x.shape[0], self.weight.shape[0], x.shape[1], most=self._facts.few_rows, itemsize=x.itemsize)

    def _norm_apart(self, x: Tensor, norm: RMSNorm | None) -> tuple[Tensor, RMSNorm | None]:
        """Norm ``x`` beforehand where the kernel would multiply it by the norm's weight in float16, which overflows;
        one row is multiplied in float32."""
        if norm is None or x.dtype != torch.float16 or x.shape[0] == 1:
            return x, norm
        return normed(x, norm, self._state), None


def normed(x: Tensor, norm: RMSNorm, state: StepState) -> Tensor:
    """``norm(x)`` in one launch."""
    return rms_norm(x, norm.weight, norm.eps, unit_offset=norm.unit_offset, pdl=state.pdl)


class Fused(TypedDict, total=False):
    """What kernels that apply a norm themselves are told of it: nothing, or weight and epsilon, and whether one is
    added to the weight."""

    norm: tuple[Tensor, float]
    unit_offset: bool


def fused(norm: RMSNorm | None) -> Fused:
    """A norm, as ``small_linear`` and the kernels for experts take it."""
    return {} if norm is None else {"norm": (norm.weight, norm.eps), "unit_offset": norm.unit_offset}
