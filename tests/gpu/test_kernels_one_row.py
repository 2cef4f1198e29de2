"""The experts of one token against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET
from tests.gpu.random_experts import (
    CLAMPED,
    check_launch,
    coded_experts,
    random_experts,
    random_routed,
    random_shared,
    wanted,
)
from tpctl.kernels.experts.one_row import RowConfig, one_row, pick_gated_row, pick_row

pytestmark = pytest.mark.gpu

# experts, of a token, hidden size, width
SHAPES = [(8, 8, 48, 96), (5, 2, 136, 36), (16, 4, 64, 48)]
CONFIGS = [None, (RowConfig(8, 64, 2), RowConfig(16, 32, 2)), (RowConfig(16, 32, 4), RowConfig(8, 128, 1))]


def check(routed, experts, error: float, *, shared=None, residual: bool = False, configs=None) -> None:
    want = wanted(routed, experts, shared)
    check_launch(one_row, routed, experts, want, error, residual=residual, shared=shared, configs=configs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation,biases,interleaved", [("silu", False, False), (CLAMPED, True, True),
                                                       ("gelu_tanh", True, False)])  # fmt: skip
@pytest.mark.parametrize("configs", CONFIGS)
@pytest.mark.parametrize("parts", ["plain", "shared", "residual", "all"])
@pytest.mark.parametrize("count,per_token,hidden,width", SHAPES)
def test_one_row(count, per_token, hidden, width, parts, configs, activation, biases, interleaved, dtype) -> None:
    torch.manual_seed(count)
    everything = parts == "all"
    experts = random_experts(
        count, hidden, width, dtype, biases=biases, activation=activation, interleaved=interleaved, first=3
    )
    routed = random_routed(1, hidden, count, per_token, dtype, factors=everything)
    routed = routed._replace(ids=routed.ids + 3)
    shared = random_shared(hidden, 3 * width // 2, dtype) if parts in ("shared", "all") else None
    error = 1e-5 if dtype is torch.float32 else 1e-2
    check(routed, experts, error, shared=shared, residual=parts in ("residual", "all"), configs=configs)


def test_experts_of_other_ranks_add_nothing() -> None:
    experts = random_experts(4, 64, 32, DTYPES[0], biases=True, first=4)
    for ids in ([1, 4, 9, 7], [0, 1, 2, 3], [4, 5, 6, 7]):
        routed = random_routed(1, 64, 4, 4, DTYPES[0])._replace(ids=torch.tensor([ids], dtype=torch.int32).to(DEVICE))
        check(routed, experts, 1e-5 if INTERPRET else 1e-2)


CODES = [
    ("e4m3", {"unit": 32, "rows_unit": 32}),
    ("e4m3", {"factors": True}),
    ("int8", {}),
    ("uint4", {"unit": 32, "zeros": True}),
    ("uint4", {"unit": 32, "first": 8}),
    ("e2m1", {"unit": 32, "exponents": True}),
    ("e2m1", {"unit": 16, "factors": True}),
]


@pytest.mark.parametrize("kind,codes", CODES)
def test_codes(kind, codes) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[0]
    plain = random_experts(4, 64, 48, dtype, biases=True, activation=CLAMPED, interleaved=True)
    experts = coded_experts(4, 64, 48, kind, experts=plain, **codes)
    routed = random_routed(1, 64, 4, 2, dtype)
    for configs in (None, (RowConfig(8, 32, 1), RowConfig(8, 64, 2))):
        check(routed, experts, 1e-5 if INTERPRET else 1e-2, configs=configs)


def test_codes_of_inputs_in_no_order_are_refused() -> None:
    experts = coded_experts(2, 32, 32, "uint4", experts=random_experts(2, 32, 32, DTYPES[0]), unit=16, groups=True)
    with pytest.raises(ValueError, match="groups in no order"):
        one_row(random_routed(1, 32, 2, 1, DTYPES[0]), experts)
    with pytest.raises(ValueError, match="2 rows are more than one"):
        one_row(random_routed(2, 32, 2, 1, DTYPES[0]), experts)


def test_choice() -> None:
    assert pick_row(768) == RowConfig(4, 1024, 4, 3, 2) and pick_row(14336) == RowConfig(4, 1024, 4, 3, 2)
    assert pick_row(192) == RowConfig(4, 256, 4, 3, 2)
    assert pick_gated_row(2048) == RowConfig(2, 2048) and pick_gated_row(576) == RowConfig(4, 1024)
