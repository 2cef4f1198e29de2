"""Experts of codes with many pairs, whose numbers are made before, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DTYPES, INTERPRET, relative_error
from tests.gpu.random_experts import CLAMPED, check_launch, coded_experts, random_experts, random_routed, wanted
from tpctl.kernels.common.codes import decode
from tpctl.kernels.experts import coded_experts as module
from tpctl.kernels.experts import decoded_matrix
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.decoded_matrix import decode_experts, decoding_pays
from tpctl.kernels.experts.grouped import grouped

pytestmark = pytest.mark.gpu
DTYPE = DTYPES[0]

CODES: list[tuple[str, dict[str, Any]]] = [
    ("e2m1", {"unit": 32, "exponents": True}),
    ("e4m3", {"unit": 32, "rows_unit": 32}),
    ("uint4", {"unit": 32, "zeros": True}),
    ("uint4", {"unit": 16, "groups": True, "zeros": True}),
    ("int8", {"factors": True}),
]


def made(kind: str, codes: dict[str, Any], count: int = 5, **more: Any) -> CodedExperts:
    plain = random_experts(count, 64, 48, DTYPE, biases=True, activation=CLAMPED, interleaved=True, **more)
    return coded_experts(count, 64, 48, kind, experts=plain, **codes)


@pytest.mark.parametrize("kind,codes", CODES)
@pytest.mark.parametrize("held", [1, 2, 5])
def test_some_experts_at_a_time(kind: str, codes: dict[str, Any], held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those here, which are not all, with tiles that nobody has."""
    torch.manual_seed(held)
    experts = made(kind, codes, first=2)
    routed = random_routed(24, 64, 9, 3, DTYPE)
    monkeypatch.setattr(decoded_matrix, "_AT_ONCE", held * 96 * 64)
    monkeypatch.setattr(decoded_matrix, "_LEAST_PAIRS", 24 * 3 // 9)
    # The interpreter's numbers are float32.
    monkeypatch.setattr(module, "decoding_pays", lambda *sizes: decoding_pays(*sizes[:-1], torch.bfloat16))
    taken: list[int] = []
    original = decoded_matrix.decode_experts

    def spy(codes: Any, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        taken.append(stop - start)
        return original(codes, start, stop, dtype)

    monkeypatch.setattr(decoded_matrix, "decode_experts", spy)
    error = 1e-5 if INTERPRET else 1e-2
    check_launch(grouped, routed, experts, wanted(routed, experts), error, residual=True, total_experts=9)
    assert sum(taken) % 10 == 0 and max(taken) <= 2 * held
    before = len(taken)
    grouped(routed, experts, total_experts=10)  # fewer of an expert
    grouped(routed._replace(x=routed.x[:16], ids=routed.ids[:16], weights=routed.weights[:16]), experts)
    assert len(taken) == before


@pytest.mark.parametrize("kind,codes", CODES)
def test_numbers_of_experts(kind: str, codes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    matrix = made(kind, codes).gate_up
    got = decode_experts(matrix.codes, 1, 4, torch.float32)
    for at in range(3):
        assert relative_error(got[at], decode(matrix.codes.of_expert(1 + at))) < 1e-6


def test_float32_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_matrix, "_LEAST_PAIRS", 0)
    monkeypatch.setattr(decoded_matrix, "decode_experts", None)
    plain = random_experts(3, 64, 48, torch.float32)
    kind, codes = CODES[0]
    experts = coded_experts(3, 64, 48, kind, experts=plain, **codes)
    routed = random_routed(20, 64, 3, 2, torch.float32)
    assert relative_error(grouped(routed, experts), wanted(routed, experts)) < 1e-5
