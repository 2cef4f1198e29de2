"""16-bit weights on processors without instructions for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.random_codes import random_codes
from tpctl.distributed import TPGroup
from tpctl.kernels.common.codes import decode
from tpctl.layers import compute, instructions
from tpctl.layers.instructions import multiplies
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights import codes, tiled_cpu
from tpctl.layers.weights.tiled_cpu import FEW, TURNED, TiledWeight


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compute, instructions):
        monkeypatch.setattr(module, "multiplies", lambda dtype: dtype is torch.float32)


@pytest.fixture
def asked() -> Iterator[None]:
    """Of another processor than this one."""
    multiplies.cache_clear()
    yield
    multiplies.cache_clear()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 40, TURNED + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_products(
    slow: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, threads: int, rows: int, biased: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("TILE", "LARGE_TILE"):
        monkeypatch.setattr(tiled_cpu, name, 7 * 96)  # rows of a tile: 7, of which the last has 5
    rng = torch.Generator().manual_seed(rows)
    weight = torch.randn((40, 96), generator=rng).to(dtype)
    bias = torch.randn(40, generator=rng).to(dtype) if biased else None
    x = torch.randn((rows, 96), generator=rng).to(dtype)
    made = compute.Compute(TPGroup(0, 1, "cpu")).weight(weight)
    assert isinstance(made, TiledWeight) and made.weight is weight
    expected = product(x, weight, bias)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(made.linear(x, bias).double(), expected, rtol=step, atol=step)
    norm = RMSNorm(96, 1e-6).to(dtype)
    norm.weight.data.copy_(torch.rand(96, generator=rng))
    assert torch.equal(made.linear(x, bias, norm), made.linear(norm(x), bias))


def test_codes_are_multiplied_in_float32(slow: None) -> None:
    held = random_codes("e4m3", 40, 96, unit=32, rows_unit=8)
    x = torch.randn((9, 96)).bfloat16()
    found = codes.CodesWeight(held).linear(x, None)
    expected = product(x, decode(held, 0, 40, torch.float32), None)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.5 * torch.finfo(torch.bfloat16).eps, atol=1e-4)


def test_float32_and_processors_that_do_are_as_before(slow: None) -> None:
    made = compute.Compute(TPGroup(0, 1, "cpu")).weight(torch.randn(32, 32))
    assert not isinstance(made, TiledWeight)


CAPABLE: dict[str, Any] = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_fp16": False}


@pytest.mark.parametrize(
    ("found", "dtype", "expected"),
    [
        (CAPABLE, torch.bfloat16, True),
        (CAPABLE, torch.float16, False),
        ({**CAPABLE, "avx512_bf16": False}, torch.bfloat16, False),
        ({**CAPABLE, "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16, True),
        ({"architecture": "x86_64", "avx2": True}, torch.bfloat16, False),
        ({"architecture": "x86_64", "avx2": True}, torch.float32, True),
        ({"architecture": "aarch64"}, torch.bfloat16, True),
    ],
)
def test_processors(
    asked: None, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], dtype: torch.dtype, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert multiplies(dtype) == expected


def test_the_limit_of_onednn_counts_and_an_old_torch_is_believed(asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CAPABLE, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert not multiplies(torch.bfloat16)
    multiplies.cache_clear()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert multiplies(torch.bfloat16)
