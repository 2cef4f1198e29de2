"""Mixtures of experts on a GPU, in as few launches as there are rows for.

one row            norm + router (+ shared gate·up) | choice + gate·up of the chosen | down of all + residual
one row, codes     norm + router + choice | gate·up of the chosen | down of all + shared + residual
up to 16           norm + router + choice | gate·up | down | sum over a token's experts + shared + residual
more               norm | router | choice | tiles | gate·up | down | sum
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpctl.errors import UnsupportedModelError
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.experts.codes_row import codes_row, takes_row
from tpctl.kernels.experts.grouped import grouped
from tpctl.kernels.experts.matrices import ExpertMatrices, SharedMatrices
from tpctl.kernels.experts.one_row import one_row
from tpctl.kernels.experts.routing import GATE_ROWS, GateScratch, Routed, Router, gate, route
from tpctl.layers.stream import Rows
from tpctl.layers.weights.dense import DenseWeight
from tpctl.layers.weights.experts import ExpertWeights, Gating, MixtureParts, Scaled, Stack
from tpctl.layers.weights.kernels import GpuFacts, StepState, normed


class CudaExperts(ExpertWeights):
    """Experts ``first`` and on, stacked as a rank has them.

    Args:
        scratch: of the routers of all layers.

    Raises:
        UnsupportedModelError: they are quantised in a way that no kernel reads.
    """

    def __init__(
        self,
        gate_up: Stack,
        down: Stack,
        gating: Gating,
        first: int,
        scratch: GateScratch,
        state: StepState,
        facts: GpuFacts,
    ) -> None:
        self._matrices = ExpertMatrices(
            _matrix(gate_up),
            _matrix(down),
            gate_up.bias,
            down.bias,
            gating.activation,
            gating.interleaved,
            first,
        )
        self._scratch, self._state, self._facts = scratch, state, facts
        self._plain = isinstance(self._matrices.gate_up, Tensor) and isinstance(self._matrices.down, Tensor)
        self._coded_row = takes_row(self._matrices)

    def mixture(
        self, rows: Rows, parts: MixtureParts, residual: Tensor | None = None, *, partial: bool = False
    ) -> Tensor:
        state = self._state
        outlet = state.sums if partial and state.sends else None
        shared = _plain(parts)
        alone = len(rows.x) == 1 and self._facts.takes(rows.x)
        if alone and self._plain and parts.scaled is None and (parts.shared is None or shared is not None):
            return one_row(
                rows.x,
                _router(parts),
                self._scratch,
                self._matrices,
                **_norm(rows),
                shared=shared,
                residual_TH=residual,
                out=residual,
                outlet=outlet,
                pdl=state.pdl,
            )
        routed = self._routed(rows, parts)
        coded = alone and self._coded_row and rows.x.dtype == torch.bfloat16
        return (codes_row if coded else grouped)(
            routed,
            self._matrices,
            total_experts=parts.count,
            shared_TH=None if parts.shared is None else parts.shared.local(Rows(routed.x)),
            residual_TH=residual,
            out=residual,
            outlet=outlet,
            pdl=state.pdl,
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
        return gate(rows.x, _router(parts), self._scratch, **_norm(rows), pdl=self._state.pdl)

    def _many(self, rows: Rows, parts: MixtureParts) -> Routed:
        x = rows.x if rows.norm is None else normed(rows.x, rows.norm, self._state)
        logits = _wide_product(x, parts.gate)
        if parts.bias is not None:
            logits += parts.bias
        ids, weights = route(logits, parts.routing, parts.per_token, parts.correction, pdl=self._state.pdl)
        factors = None if parts.shared_gate is None else _wide_product(x, parts.shared_gate.view(1, -1)).sigmoid()
        return Routed(x, ids, weights, factors)


def _router(parts: MixtureParts) -> Router:
    return Router(parts.gate, parts.routing, parts.per_token, parts.bias, parts.correction, parts.shared_gate)


def _norm(rows: Rows) -> dict[str, Any]:
    """The norm that is still to be applied, as the kernels take it."""
    norm = rows.norm
    return {} if norm is None else {"norm": (norm.weight, norm.eps), "unit_offset": norm.unit_offset}


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32."""
    if x.is_cuda and x.dtype == weight.dtype:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


def _matrix(stack: Stack) -> Tensor | Codes:
    """A stack's matrix, each row of it in one piece."""
    if isinstance(stack.matrix, Tensor):
        return stack.matrix.contiguous()
    if len(stack.matrix) > 1:  # of a checkpoint's, the loader says it before it reads them
        raise UnsupportedModelError("experts whose gate and up are quantised in other groups do not run on a GPU")
    return stack.matrix[0]


def _plain(parts: MixtureParts) -> SharedMatrices | None:
    """The shared MLP's weights, where the kernel for one row takes them."""
    shared = parts.shared
    if shared is None:
        return None
    gate_up, down = shared.gate_up_proj, shared.down_proj
    weights = [linear.matrix.weight for linear in (gate_up, down) if isinstance(linear.matrix, DenseWeight)]
    if len(weights) < 2 or gate_up.bias is not None or down.bias is not None or gate_up.activation != "silu":
        return None
    return SharedMatrices(*weights)
