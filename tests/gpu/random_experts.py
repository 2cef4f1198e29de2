"""Random mixtures for tests of kernels, and what they are held against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tests.unit.random_codes import random_codes
from tpctl.arch.block import Clamped
from tpctl.arch.routing import Routing
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.matrices import ExpertMatrices, SharedMatrices, experts_reference, shared_reference
from tpctl.kernels.experts.routing import Routed, Router

CLAMPED = Clamped(alpha=1.702, limit=1.5)
"""With a limit that values of tests reach."""


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


PDL = (False,) if INTERPRET else (False, True)


def check_launch(launch, routed: Routed, experts, want: torch.Tensor, error: float, *, residual: bool, **more) -> None:
    """What ``launch`` gives, launched early or not, is what is ``want``ed, plus the residual if there is one."""
    if residual:
        more["residual_TH"] = random(*routed.x.shape, dtype=routed.x.dtype)
        want = want + more["residual_TH"].double()
    for pdl in PDL:
        out = torch.full_like(routed.x, float("nan"))
        got = launch(routed, experts, out=out, pdl=pdl, **more)
        assert got is out and relative_error(got, want) < error


def random_experts(
    count: int, hidden: int, width: int, dtype: torch.dtype, *, biases: bool = False, **more: Any
) -> ExpertMatrices[DenseMatrix]:
    return ExpertMatrices(
        DenseMatrix(random(count, 2 * width, hidden, dtype=dtype, scale=hidden**-0.5)),
        DenseMatrix(random(count, hidden, width, dtype=dtype, scale=width**-0.5)),
        random(count, 2 * width, dtype=dtype) if biases else None,
        random(count, hidden, dtype=dtype) if biases else None,
        **more,
    )


def coded_experts(
    count: int, hidden: int, width: int, kind: Any, *, experts: ExpertMatrices[DenseMatrix], **codes: Any
) -> CodedExperts:
    """`experts` with codes of random numbers in place of theirs; options that name inputs hold for both matrices."""
    made = (
        random_codes(kind, n, k, experts=count, seed=n, device=str(DEVICE), **codes)
        for n, k in ((2 * width, hidden), (hidden, width))
    )
    gate_up, down = (CodedMatrix(_of_each(matrix, count)) for matrix in made)
    return CodedExperts(**{**vars(experts), "gate_up": gate_up, "down": down})


def _of_each(codes: Codes, count: int) -> Codes:
    """With an order of the inputs for each expert, where they are in none."""
    if codes.groups is None:
        return codes
    orders = [codes.groups[torch.randperm(codes.columns)] for _ in range(count)]
    return replace(codes, groups=torch.stack(orders))


def random_shared(hidden: int, width: int, dtype: torch.dtype) -> SharedMatrices:
    return SharedMatrices(
        random(2 * width, hidden, dtype=dtype, scale=hidden**-0.5),
        random(hidden, width, dtype=dtype, scale=width**-0.5),
    )


def random_routed(rows: int, hidden: int, count: int, per_token: int, dtype: torch.dtype, factors=False) -> Routed:
    ids = torch.stack([torch.randperm(count)[:per_token] for _ in range(rows)]).to(DEVICE, torch.int32)
    return Routed(
        random(rows, hidden, dtype=dtype),
        ids,
        torch.rand(rows, per_token).to(DEVICE),
        torch.rand(rows).to(DEVICE) if factors else None,
    )


def wanted(routed: Routed, experts: ExpertMatrices[Any], shared: SharedMatrices | None = None) -> torch.Tensor:
    """In float64."""
    x = routed.x.double()
    total = experts_reference(x, routed.ids, routed.weights, experts)
    return total if shared is None else total + shared_reference(x, shared, routed.factors)


def outline(kind: str, hidden: int, width: int, count: int, per_token: int) -> tuple[Router, ExpertMatrices[Any]]:
    """Of numbers, MXFP4 ("e2m1") or FP8 in blocks ("e4m3"), without memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def matrix(n: int, k: int) -> Any:
        if kind == "bf16":
            return DenseMatrix(empty(count, n, k))
        if kind == "e2m1":
            values, scales = (empty(count, n, k // part, dtype=torch.uint8) for part in (2, 32))
            return CodedMatrix(Codes("e2m1", k, values, scales, unit=32))
        scales = empty(count, -(-n // 128), -(-k // 128), dtype=torch.bfloat16)
        values, rows = empty(count, n, k, dtype=torch.float8_e4m3fn), empty(n, dtype=torch.int32)
        return CodedMatrix(Codes("e4m3", k, values, scales, rows=rows, unit=128))

    router = Router(empty(count, hidden), Routing("softmax", True), per_token)
    return router, ExpertMatrices(matrix(2 * width, hidden), matrix(hidden, width))
