"""Quantised weights of a GPU's layers, for every number of rows and all that may stand around a linear."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.code_cases import KINDS, codes_of
from tests.gpu.here import DEVICE, DTYPE, INTERPRET, relative_error
from tpctl.kernels.common.launch import capability, num_multiprocessors
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.kernels.linear.packed_gemm import PackedConfig
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.codes import CodesWeight
from tpctl.layers.weights.codes_cuda import KernelCodesWeight
from tpctl.layers.weights.kernels import GpuFacts, StepState

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

OUT, IN = 48, 256


def weights(
    name: str, *, rounds: bool = False, multiprocessors: int | None = None
) -> tuple[KernelCodesWeight, CodesWeight]:
    """As kernels multiply by them, and in plain torch."""
    codes = replace(codes_of(name, OUT, IN), rounds=rounds)
    facts = GpuFacts(
        hopper=True, multiprocessors=multiprocessors or num_multiprocessors(DEVICE), few_rows=16, wide=INTERPRET
    )
    state = StepState(pdl=not INTERPRET)
    return KernelCodesWeight(codes, GemvScratch.allocate(DEVICE), state, facts), CodesWeight(codes)


@pytest.mark.parametrize("what", ["linear", "norm", "gated", "add_to", "partial"])
@pytest.mark.parametrize("rows", [1, 17, 600])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_is_what_plain_torch_computes(name, rounds, rows, what):
    kernels, plain = weights(name, rounds=rounds)
    torch.manual_seed(rows)
    x = torch.randn(rows, IN).to(DEVICE, DTYPE)
    bias = torch.randn(OUT).to(DEVICE, DTYPE)
    norm = RMSNorm(IN, 1e-6, DTYPE).to(DEVICE)
    norm.weight.copy_(1 + 0.1 * torch.randn(IN))
    if what == "gated":
        got, want = (one.gated(x, bias, "silu", norm) for one in (kernels, plain))
    elif what == "add_to":
        got, want = (torch.ones(rows, OUT, device=DEVICE, dtype=DTYPE) for _ in range(2))
        kernels.add_to(got, x, bias)
        plain.add_to(want, x, bias)
    elif what == "partial":
        got, want = (one.partial(x, bias) for one in (kernels, plain))
    else:
        got, want = (one.linear(x, bias, norm if what == "norm" else None) for one in (kernels, plain))
    exact = 1e-5 if DTYPE is torch.float32 else 1e-2
    assert relative_error(got, want) < (0.05 if kernels._way(x) in ("scaled", "cublas") else exact)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_four_bits_of_some_hundred_rows(name: str, gated: bool) -> None:
    if capability(DEVICE)[0] != 9:
        pytest.skip("such tiles are for Hopper's tensor cores")
    kernels, plain = weights(name, multiprocessors=1)
    torch.manual_seed(0)
    x, bias = torch.randn(150, IN).to(DEVICE, torch.bfloat16), torch.randn(OUT).to(DEVICE, torch.bfloat16)
    norm = RMSNorm(IN, 1e-6, torch.bfloat16).to(DEVICE)
    norm.weight.copy_(1 + 0.1 * torch.randn(IN))
    assert isinstance(kernels._way(x), PackedConfig)
    got, want = (one.gated(x, bias, "silu", norm) if gated else one.linear(x, bias, norm) for one in (kernels, plain))
    assert relative_error(got, want) < 1e-2
