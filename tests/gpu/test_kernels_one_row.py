"""The experts of one token against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET
from tests.gpu.random_experts import CLAMPED, check_launch, random, random_experts, random_shared, wanted
from tpctl.arch.routing import Routing
from tpctl.kernels.experts import one_row as one_row_module
from tpctl.kernels.experts.one_row import RowConfig, held_of_shared, one_row, pick_row
from tpctl.kernels.experts.routing import GateScratch, Router, gate_reference

pytestmark = pytest.mark.gpu

# experts, of a token, hidden size, width
SHAPES = [(8, 8, 48, 96), (5, 2, 136, 36), (16, 4, 64, 48)]
CONFIGS = [None, RowConfig(8, 64, 2, 16, 32, 2, 4), RowConfig(16, 32, 4, 8, 128, 1, 8)]


def check(x, router, experts, error: float, *, shared=None, residual: bool = False, config=None, **norm) -> None:
    routed = gate_reference(x, router, **norm)
    want = wanted(routed, experts, shared)
    scratch = GateScratch.allocate(DEVICE)

    def launch(routed, experts, **more):
        return one_row(x, router, scratch, experts, shared=shared, config=config, **norm, **more)

    for _ in range(3):
        check_launch(launch, routed, experts, want, error, residual=residual)


def random_router(count: int, per_token: int, hidden: int, dtype, *, everything: bool = False) -> Router:
    router = Router(random(count, hidden, dtype=dtype, scale=2 * hidden**-0.5), Routing("softmax", True), per_token)
    if not everything:
        return router
    bias, shared = random(count, dtype=dtype), random(1, hidden, dtype=dtype, scale=hidden**-0.5)
    return router._replace(bias=bias, correction=torch.rand(count, device=DEVICE), shared=shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation,biases,interleaved", [("silu", False, False), (CLAMPED, True, True),
                                                       ("gelu_tanh", True, False)])  # fmt: skip
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("parts", ["plain", "shared", "residual", "all"])
@pytest.mark.parametrize("count,per_token,hidden,width", SHAPES)
def test_one_row(count, per_token, hidden, width, parts, config, activation, biases, interleaved, dtype) -> None:
    torch.manual_seed(count)
    everything = parts == "all"
    experts = random_experts(count, hidden, width, dtype, biases=biases, activation=activation, interleaved=interleaved)
    router = random_router(count, per_token, hidden, dtype, everything=everything)
    shared = random_shared(hidden, 3 * width // 2, dtype) if parts in ("shared", "all") else None
    norm = {"norm": (random(hidden, dtype=dtype), 1e-6), "unit_offset": biases} if parts != "plain" else {}
    check(random(1, hidden, dtype=dtype), router, experts, 1e-5 if dtype is torch.float32 else 1e-2, shared=shared,
          residual=parts in ("residual", "all"), config=config, **norm)  # fmt: skip


def test_experts_of_other_ranks_add_nothing() -> None:
    torch.manual_seed(0)
    experts = random_experts(4, 64, 32, DTYPES[0], biases=True, first=4)
    for per_token in (1, 4, 12):
        router = random_router(12, per_token, 64, DTYPES[0])
        check(random(1, 64, dtype=DTYPES[0]), router, experts, 1e-5 if INTERPRET else 1e-2)


def test_what_is_refused() -> None:
    experts = random_experts(2, 32, 32, DTYPES[0])
    router, scratch = random_router(2, 1, 32, DTYPES[0]), GateScratch.allocate(DEVICE)
    with pytest.raises(ValueError, match="2 rows are more than one"):
        one_row(random(2, 32, dtype=DTYPES[0]), router, scratch, experts)


@pytest.mark.parametrize("held", [(0, False), (8, True), (8, False), (0, True)])
def test_a_shared_expert_is_read_before_the_wait_or_behind_it(held, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features and outputs that fill no tile, and programs that have none."""
    torch.manual_seed(3)
    monkeypatch.setattr(one_row_module, "held_of_shared", lambda *sizes: held)
    experts = random_experts(6, 40, 24, DTYPES[0])
    router = random_router(6, 2, 40, DTYPES[0])._replace(shared=random(1, 40, dtype=DTYPES[0], scale=0.2))
    norm = {"norm": (random(40, dtype=DTYPES[0]), 1e-6)}
    config, shared = RowConfig(8, 64, 2, 16, 32, 2, 4), random_shared(40, 20, DTYPES[0])
    error = 1e-5 if DTYPES[0] is torch.float32 else 1e-2
    check(random(1, 40, dtype=DTYPES[0]), router, experts, error, shared=shared, residual=True, config=config, **norm)


def test_what_is_read_before_the_wait() -> None:
    """What fits registers, where a program has one block of down: all of Qwen3.6-35B-A3B's."""
    row = pick_row(2048, 512, itemsize=2, programs=132, limit=232448)
    assert held_of_shared(2048, 512, 2, 132, row) == (4, True)
    assert held_of_shared(2048, 0, 2, 132, row) == (0, False)
    assert held_of_shared(2048, 1024, 2, 132, row) == (0, False)
    assert held_of_shared(4096, 512, 2, 132, row._replace(down_n=32)) == (0, True)


def test_choice() -> None:
    assert pick_row(2048, 768, itemsize=2, programs=132, limit=232448) == RowConfig(8, 2048, 3, 16, 1024, 5)
    assert pick_row(2880, 2880, itemsize=2, programs=132, limit=232448) == RowConfig(8, 1024, 5, 8, 1024, 9)
    assert pick_row(4096, 1408, itemsize=2, programs=132, limit=232448) == RowConfig(8, 1024, 5, 16, 512, 9)
