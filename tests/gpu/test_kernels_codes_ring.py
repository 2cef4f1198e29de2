"""Linears of few rows whose codes come through a ring in shared memory, against what the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from tests.gpu.code_cases import codes_of, widened
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tests.gpu.threads import Threads
from tpctl.kernels.linear import codes_ring as module
from tpctl.kernels.linear.codes_linear import codes_linear_reference
from tpctl.kernels.linear.codes_ring import CodesRingConfig, codes_ring

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    if INTERPRET:
        monkeypatch.setattr(module, "codes_ring_kernel", Threads(module.codes_ring_kernel))


CASES = [
    (1, 64, 1024, CodesRingConfig(4, 2, 3, programs=3, wide=2)),  # a program with no second unit
    (1, 32, 2048, CodesRingConfig(2, 8, 1, programs=2)),
    (2, 48, 1024, CodesRingConfig(4, 1, 2, programs=2)),
    (3, 48, 1024, CodesRingConfig(2, 2, 3, programs=2)),
    (8, 32, 1024, CodesRingConfig(2, 1, 5, programs=4)),
]


@pytest.mark.parametrize("parts", ["plain", "bias+residual", "norm", "all"])
@pytest.mark.parametrize("rows,out_features,in_features,config", CASES)
@pytest.mark.parametrize("name", ["gptq", "awq", "fp8 channel"])
def test_matches_reference(name, rows, out_features, in_features, config, parts):
    if rows > 1 and parts == "norm":
        pytest.skip("a launch of its own")
    weight_rows = 2 * out_features if parts == "all" else out_features
    codes = codes_of(name, weight_rows, in_features, seed=rows)
    if codes.kind == "uint4":
        codes = replace(codes, scales=codes.scales.to(torch.float16 if parts == "plain" else torch.bfloat16))
    torch.manual_seed(rows)
    dtype = torch.bfloat16
    x = torch.randn(rows, in_features + 8).to(DEVICE, dtype)[:, :in_features]
    options: dict[str, Any] = {}
    if parts in ("bias+residual", "all"):
        options["bias_O"] = torch.randn(weight_rows).to(DEVICE, dtype)
        options["residual_TO"] = torch.randn(rows, out_features).to(DEVICE, dtype)
    if rows == 1 and parts in ("norm", "all"):
        options["norm"] = ((1 + 0.1 * torch.randn(in_features)).to(DEVICE, dtype), 1e-6)
        options["unit_offset"] = parts == "all"
    if parts == "all":
        options["activation"] = "silu" if rows > 1 else "gelu_tanh"
    want = codes_linear_reference(x.double(), codes, **{key: widened(value) for key, value in options.items()})
    out = torch.full((rows, out_features), float("nan"), device=DEVICE, dtype=dtype)
    codes_ring(x, codes, out=out, config=config, pdl=not INTERPRET, **options)
    assert relative_error(out, want) < 8e-3
