"""Routing kernels against their reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET
from tpctl.arch.routing import Routing
from tpctl.kernels.experts.routing import GateScratch, Routed, Router, gate, gate_reference, route
from tpctl.kernels.experts.routing_reference import route as route_reference

pytestmark = pytest.mark.gpu

SIGMOID = Routing("sigmoid", True, scale=2.5, epsilon=1e-20)
ROUTINGS = [
    (Routing("softmax", True), 128, 8, False),
    (Routing("softmax"), 60, 4, False),
    (Routing("softmax", True), 8, 2, False),
    (Routing("softmax of chosen"), 32, 4, False),
    (SIGMOID, 72, 6, True),
    (Routing("sigmoid", True, 8, 4, 2.5, 1e-20), 256, 8, True),
    (Routing("sigmoid", True, 3, 2, 1.0, 1e-20), 36, 16, True),
    (Routing("softmax", True), 512, 10, False),
    (Routing("softmax of chosen"), 4, 4, False),
]


def agree(got: Routed, want: Routed, error: float) -> None:
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.weights, want.weights, rtol=error, atol=error)


@pytest.mark.parametrize("routing,count,per_token,corrected", ROUTINGS)
@pytest.mark.parametrize("rows", [1, 5])
def test_routes(routing: Routing, count: int, per_token: int, corrected: bool, rows: int) -> None:
    torch.manual_seed(count)
    logits = torch.randn(rows, count + 3, device=DEVICE)[:, :count]
    correction = torch.rand(count, device=DEVICE) if corrected else None
    for pdl in (False,) if INTERPRET else (False, True):
        ids, weights = route(logits, routing, per_token, correction, pdl=pdl)
        agree(Routed(logits, ids, weights), Routed(logits, *route_reference(logits, routing, per_token, correction)),
              2e-6)  # fmt: skip


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "softmax of chosen"])
def test_equal_scores_go_to_the_smaller_expert(scores) -> None:
    logits = torch.randint(0, 3, (6, 20), device=DEVICE).float()
    routing = Routing(scores, groups=4, top_groups=2)
    assert torch.equal(route(logits, routing, 7)[0], route_reference(logits, routing, 7)[0])


def test_what_is_no_number_still_gives_experts_that_are() -> None:
    logits = torch.randn(3, 12, device=DEVICE)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    logits[2, 4:] = float("-inf")
    for scores in ("softmax", "softmax of chosen"):
        ids, weights = route(logits, Routing(scores), 8)
        assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 12 for row in ids.tolist())
        assert weights[0].isnan().all() and weights[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["plain", "norm", "bias", "shared", "all"])
@pytest.mark.parametrize("rows,hidden,routing,count,per_token,corrected",
    [(1, 200, *ROUTINGS[0]), (3, 96, *ROUTINGS[1]), (16, 64, *ROUTINGS[4])])  # fmt: skip
def test_gates(rows, hidden, routing, count, per_token, corrected, parts, dtype) -> None:
    torch.manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(DEVICE, dtype)

    x, weight = random(rows, hidden + 8)[:, :hidden], random(count, hidden) / hidden**0.5
    router, options = Router(weight, routing, per_token), {}
    if corrected:
        router = router._replace(correction=torch.rand(count, device=DEVICE))
    if parts in ("bias", "all"):
        router = router._replace(bias=random(count))
    if parts in ("shared", "all"):
        router = router._replace(shared=random(1, hidden) / hidden**0.5)
    if parts in ("norm", "all"):
        options |= {"norm": (random(hidden), 1e-6), "unit_offset": parts == "all"}
    want = gate_reference(x, router, **options)
    scratch = GateScratch.allocate(DEVICE)
    for pdl in (False,) if INTERPRET else (False, True):
        got = gate(x, router, scratch, pdl=pdl, **options)
        agree(got, want, 1e-5 if dtype is torch.float32 else 1e-3)
        torch.testing.assert_close(got.x, want.x)
        assert (got.factors is None) == (want.factors is None)
        if got.factors is not None:
            torch.testing.assert_close(got.factors, want.factors, rtol=1e-4, atol=1e-4)
        assert (scratch.counters == 0).all()


def test_more_rows_than_the_scratch_is_for_are_refused() -> None:
    with pytest.raises(ValueError, match="17 rows of 4 experts"):
        gate(torch.zeros(17, 8, device=DEVICE), Router(torch.zeros(4, 8, device=DEVICE), ROUTINGS[8][0], 2),
             GateScratch.allocate(DEVICE))  # fmt: skip
