"""The residual stream on a GPU: sums over the ranks, additions and norms in one launch, or within the linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.norm import add_rms_norm
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream import ResidualStream, Rows, Summand, Together
from tpctl.layers.weights.kernels import GpuFacts, StepState, normed


class CudaStream(ResidualStream):
    """A step's residual.

    On one rank few rows are normed by the linear that reads them, and added to by the one that writes them. Otherwise
    a sum stays open (``_open``: [T, H], or runs [S, T, H] of it) until the next norm, which does all three.
    """

    def __init__(
        self,
        embedded: Tensor,
        group: TPGroup,
        state: StepState,
        peers_for: Callable[[Tensor], PeerBuffer | None],
        facts: GpuFacts,
    ) -> None:
        super().__init__(embedded, group)
        self._state, self._peers_for, self._facts = state, peers_for, facts
        self._open: Tensor | None = None
        self._choose()
        self._residual = self._all_reduce(embedded)

    def normed(self, norm: RMSNorm | None) -> Rows:
        if norm is None or not norm.in_kernels:
            assert self._open is None, "a sum that is left open is followed by a norm that adds it"
            return Rows(self._residual if norm is None else norm(self._residual))
        if self._within:
            return Rows(self._residual, norm)
        if self._open is None:
            return Rows(normed(self._residual, norm, self._state))
        added, self._open = self._open, None
        state, offset = self._state, norm.unit_offset
        if state.sums is not None:
            return Rows(
                state.sums.all_reduce_add_rms_norm(
                    added,
                    self._residual,
                    norm.weight,
                    norm.eps,
                    unit_offset=offset,
                    sent=state.sends,
                    pdl=state.pdl,
                )
            )
        added = self._group.all_reduce(added)
        return Rows(add_rms_norm(added, self._residual, norm.weight, norm.eps, unit_offset=offset, pdl=state.pdl))

    def add(self, summand: Summand, x: Any, norm: RMSNorm | None = None, scale: float = 1.0) -> None:
        assert self._open is None, "every sum is followed by a norm"
        if norm is not None or scale != 1.0 or (isinstance(summand, Together) and not self._within):
            total = self._all_reduce(summand.local(x))
            self._residual.add_(total if norm is None else normed(total, norm, self._state), alpha=scale)
        elif self._within:
            summand.add_to(self._residual, x)
        else:
            self._open = summand.partial(x)

    def keep(self, rows: Tensor) -> None:
        assert self._open is None, "rows are dropped between a norm and the sum that follows"
        super().keep(rows)
        self._choose()

    def _choose(self) -> None:
        """How sums of the residual's shape are taken; all of a step have it until rows are dropped."""
        few = self._facts.takes(self._residual) and len(self._residual) <= self._facts.few_rows
        self._state.sums = self._peers_for(self._residual)
        self._state.sends = self._state.sums is not None and few
        self._within = few and self._group.size == 1

    def _all_reduce(self, x: Tensor) -> Tensor:
        state = self._state
        if state.sums is not None:
            return state.sums.all_reduce(x, out=x, pdl=state.pdl)
        return self._group.all_reduce(x)
