"""The experts of one token, of codes, against what the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.here import DEVICE
from tests.gpu.random_experts import CLAMPED, check_launch, coded_experts, random, random_experts, random_routed, wanted
from tpctl.kernels.experts.codes_row import CodesRowConfig, codes_row, takes_row

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

CODES: dict[str, dict[str, Any]] = {
    "mxfp4": {"kind": "e2m1", "unit": 32, "exponents": True},
    "nvfp4": {"kind": "e2m1", "unit": 16, "factors": True},
    "awq": {"kind": "uint4", "unit": 32, "zeros": True},
    "gptq": {"kind": "uint4", "unit": 64},
    "fp8 blocks": {"kind": "e4m3", "unit": 64, "rows_unit": 32},
    "fp8 channels": {"kind": "e4m3", "factors": True},
    "int8 channels": {"kind": "int8"},
}
# experts, of a token, hidden size, width
SHAPES = [(4, 2, 192, 96), (3, 3, 128, 160)]
CONFIGS = [
    None,
    (CodesRowConfig(16, 2, 1), CodesRowConfig(16, 1, 3)),
    (CodesRowConfig(32, 1, 9), CodesRowConfig(32, 4, 2)),
]


def made(name: str, count: int, hidden: int, width: int, **more: Any):
    plain = random_experts(count, hidden, width, torch.bfloat16, **more)
    return coded_experts(count, hidden, width, experts=plain, **CODES[name])


@pytest.mark.parametrize("activation,biases,interleaved", [("silu", False, False), (CLAMPED, True, True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CODES)
def test_matches_reference(name, config, shape, activation, biases, interleaved) -> None:
    torch.manual_seed(shape[0])
    count, per_token, hidden, width = shape
    experts = made(name, count, hidden, width, biases=biases, activation=activation, interleaved=interleaved)
    routed = random_routed(1, hidden, count, per_token, torch.bfloat16)
    want = wanted(routed, experts)
    check_launch(codes_row, routed, experts, want, 1e-2, residual=biases, configs=config)


@pytest.mark.parametrize("name", ["mxfp4", "fp8 channels"])
def test_experts_of_other_ranks_add_nothing(name: str) -> None:
    torch.manual_seed(1)
    experts = replace(made(name, 3, 128, 64, biases=True), first=3)
    for ids in ([[0, 4]], [[4, 5]], [[2, 6]]):
        routed = random_routed(1, 128, 9, 2, torch.bfloat16)._replace(
            ids=torch.tensor(ids, device=DEVICE, dtype=torch.int32)
        )
        check_launch(codes_row, routed, experts, wanted(routed, experts), 1e-2, residual=True, total_experts=9)


@pytest.mark.parametrize("factors", [False, True])
def test_shared_expert(factors: bool) -> None:
    torch.manual_seed(2)
    experts = made("gptq", 4, 128, 64)
    routed = random_routed(1, 128, 4, 2, torch.bfloat16, factors=factors)
    shared = random(1, 128, dtype=torch.bfloat16)
    want = wanted(routed, experts) + shared.double() * (routed.factors.double()[:, None] if factors else 1)
    check_launch(codes_row, routed, experts, want, 1e-2, residual=True, shared_TH=shared)


def test_what_it_takes() -> None:
    experts = made("gptq", 2, 128, 64)
    assert takes_row(experts)
    assert not takes_row(made("gptq", 2, 136, 64))  # rows of 68 bytes
    routed = random_routed(2, 128, 2, 1, torch.bfloat16)
    with pytest.raises(ValueError, match=r"2 rows of torch\.bfloat16 and such experts; use `grouped`"):
        codes_row(routed, experts)
