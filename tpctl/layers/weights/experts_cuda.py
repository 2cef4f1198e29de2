"""Mixtures of experts on a GPU, in as few launches as there are rows for.

one row, by rings  norm + router | choice + gate·up of the chosen | choice + down of all + residual
one row            norm + router (+ shared gate·up) | choice + gate·up of the chosen | down of all + residual
one row, codes     norm + router + choice | gate·up of the chosen | down of all + shared + residual
up to 16           norm + router + choice | gate·up | down | sum over a token's experts + shared + residual
more               norm | router | choice | tiles | gate·up | down | sum
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tpctl.errors import UnsupportedModelError
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.codes_row import codes_row, takes_row
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.grouped import grouped
from tpctl.kernels.experts.matrices import ExpertMatrices, SharedMatrices
from tpctl.kernels.experts.matrix import ExpertMatrix
from tpctl.kernels.experts.one_row import one_row
from tpctl.kernels.experts.routing import GATE_ROWS, GateScratch, Routed, Router, gate, route
from tpctl.kernels.experts.row_ring import RingConfigs, pick_row_ring, row_ring
from tpctl.layers.stream import Rows
from tpctl.layers.weights.experts import ExpertWeights, Gating, MixtureParts, Scaled, Stack
from tpctl.layers.weights.kernels import GpuFacts, StepState, fused, normed


class CudaExperts(ExpertWeights):
    """Experts in any forms, also two in one mixture.

    Args:
        scratch: of the routers of all layers.
    """

    def __init__(
        self, matrices: ExpertMatrices[ExpertMatrix], scratch: GateScratch, state: StepState, facts: GpuFacts
    ) -> None:
        self._matrices = matrices
        self._scratch, self._state, self._facts = scratch, state, facts
        self._rings: RingConfigs | Literal[False] | None = None

    def mixture(
        self, rows: Rows, parts: MixtureParts, residual: Tensor | None = None, *, partial: bool = False
    ) -> Tensor:
        outlet = self._state.sums if partial and self._state.sends else None
        if len(rows.x) == 1 and self._facts.takes(rows.x):
            rings = self._ringed(rows, parts) if outlet is None else None
            if rings is not None:
                return row_ring(
                    rows.x,
                    _router(parts),
                    self._scratch,
                    self._matrices,
                    **fused(rows.norm),
                    residual_TH=residual,
                    out=residual,
                    configs=rings,
                    pdl=self._state.pdl,
                )
            return self._row(rows, parts, residual, outlet)
        return self._chosen(grouped, rows, parts, residual, outlet)

    def _ringed(self, rows: Rows, parts: MixtureParts) -> RingConfigs | None:
        """How one row is read through rings; None: otherwise. Found at the first row, before a step is captured."""
        if rows.x.dtype != torch.bfloat16 or parts.shared is not None or parts.scaled is not None:
            return None
        if self._rings is None:
            facts = self._facts
            found = pick_row_ring(
                _router(parts), self._matrices, multiprocessors=facts.multiprocessors, hopper=facts.hopper
            )
            self._rings = found or False
        return self._rings or None

    def _row(self, rows: Rows, parts: MixtureParts, residual: Tensor | None, outlet: PeerBuffer | None) -> Tensor:
        """``mixture`` of one row, in a dtype that the kernels for it take."""
        return self._chosen(grouped, rows, parts, residual, outlet)

    def _chosen(
        self,
        way: Callable[..., Tensor],
        rows: Rows,
        parts: MixtureParts,
        residual: Tensor | None,
        outlet: PeerBuffer | None,
    ) -> Tensor:
        """``mixture``, by kernels that are told which experts were chosen."""
        routed = self._routed(rows, parts)
        return way(
            routed,
            self._matrices,
            total_experts=parts.count,
            shared_TH=None if parts.shared is None else parts.shared.local(Rows(routed.x)),
            residual_TH=residual,
            out=residual,
            outlet=outlet,
            pdl=self._state.pdl,
        )

    def _routed(self, rows: Rows, parts: MixtureParts) -> Routed:
        """Few rows in one launch; so are all in float32, where a choice must not depend on the batch."""
        count = len(rows.x)
        if parts.scaled is not None:
            return self._scaled(rows, parts, parts.scaled)
        if count <= GATE_ROWS:
            return self._gated(rows, parts)
        if rows.x.dtype != torch.float32:
            return self._many(rows, parts)
        starts = range(0, count, GATE_ROWS)
        pieces = [self._gated(Rows(rows.x[start : start + GATE_ROWS], rows.norm), parts) for start in starts]
        x, ids, weights = (torch.cat([piece[i] for piece in pieces]) for i in range(3))  # type: ignore[misc]
        factors = [piece.factors for piece in pieces if piece.factors is not None]
        return Routed(x, ids, weights, torch.cat(factors) if factors else None)

    def _scaled(self, rows: Rows, parts: MixtureParts, scaled: Scaled) -> Routed:
        """Where the router reads what the experts do before its norm."""
        assert parts.factors is not None
        x = rows.x if rows.norm is None else normed(rows.x, rows.norm, self._state)
        logits = scaled(rows.x) @ parts.gate.float().t()
        ids, weights = route(logits, parts.routing, parts.per_token, parts.correction, pdl=self._state.pdl)
        return Routed(x, ids, weights * parts.factors.float()[ids.long()])

    def _gated(self, rows: Rows, parts: MixtureParts) -> Routed:
        return gate(rows.x, _router(parts), self._scratch, **fused(rows.norm), pdl=self._state.pdl)

    def _many(self, rows: Rows, parts: MixtureParts) -> Routed:
        x = rows.x if rows.norm is None else normed(rows.x, rows.norm, self._state)
        logits = _wide_product(x, parts.gate)
        if parts.bias is not None:
            logits += parts.bias
        ids, weights = route(logits, parts.routing, parts.per_token, parts.correction, pdl=self._state.pdl)
        factors = None if parts.shared_gate is None else _wide_product(x, parts.shared_gate.view(1, -1)).sigmoid()
        return Routed(x, ids, weights, factors)


class CudaDenseExperts(CudaExperts):
    """Experts of numbers, by kernels that route one row themselves."""

    _matrices: ExpertMatrices[DenseMatrix]

    def _row(self, rows: Rows, parts: MixtureParts, residual: Tensor | None, outlet: PeerBuffer | None) -> Tensor:
        shared = _plain(parts)
        if parts.scaled is not None or (parts.shared is not None and shared is None):
            return super()._row(rows, parts, residual, outlet)
        return one_row(
            rows.x,
            _router(parts),
            self._scratch,
            self._matrices,
            **fused(rows.norm),
            shared=shared,
            residual_TH=residual,
            out=residual,
            outlet=outlet,
            pdl=self._state.pdl,
        )


class CudaCodedExperts(CudaExperts):
    """Experts of codes that ``codes_row`` reads."""

    def _row(self, rows: Rows, parts: MixtureParts, residual: Tensor | None, outlet: PeerBuffer | None) -> Tensor:
        way = codes_row if rows.x.dtype == torch.bfloat16 else grouped
        return self._chosen(way, rows, parts, residual, outlet)


def cuda_experts(
    gate_up: Stack, down: Stack, gating: Gating, first: int, scratch: GateScratch, state: StepState, facts: GpuFacts
) -> CudaExperts:
    """Experts ``first`` and on, stacked as a rank has them, in the forms that these have.

    Raises:
        UnsupportedModelError: they are quantised in a way that no kernel reads.
    """
    maker = _KernelMatrices()
    inner, outer = gate_up.matrix(maker), down.matrix(maker)
    rest = gate_up.bias, down.bias, gating.activation, gating.interleaved, first
    if isinstance(inner, DenseMatrix) and isinstance(outer, DenseMatrix):
        return CudaDenseExperts(ExpertMatrices(inner, outer, *rest), scratch, state, facts)
    if isinstance(inner, CodedMatrix) and isinstance(outer, CodedMatrix):
        coded = CodedExperts(inner, outer, *rest)
        return (CudaCodedExperts if takes_row(coded) else CudaExperts)(coded, scratch, state, facts)
    return CudaExperts(ExpertMatrices(inner, outer, *rest), scratch, state, facts)


class _KernelMatrices:
    """Makes the matrices of a stack what the kernels read: each row of it in one piece."""

    def numbers(self, matrix: Tensor) -> ExpertMatrix:
        return DenseMatrix(matrix.contiguous())

    def codes(self, codes: tuple[Codes, ...]) -> ExpertMatrix:
        if len(codes) > 1:  # of a checkpoint's, the loader says it before it reads them
            raise UnsupportedModelError("experts whose gate and up are quantised in other groups do not run on a GPU")
        return CodedMatrix(codes[0])


def _router(parts: MixtureParts) -> Router:
    return Router(parts.gate, parts.routing, parts.per_token, parts.bias, parts.correction, parts.shared_gate)


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32."""
    if x.is_cuda and x.dtype == weight.dtype:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


def _plain(parts: MixtureParts) -> SharedMatrices | None:
    """The shared MLP's weights, where the kernel for one row takes them."""
    weights = None if parts.shared is None else parts.shared.plain()
    return None if weights is None else SharedMatrices(*weights)
