"""Linears of few rows whose codes come through a ring in shared memory, against what the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from tests.gpu.code_cases import KINDS, codes_of, widened
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tests.gpu.threads import Threads
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.linear import codes_ring as module
from tpctl.kernels.linear.codes_linear import codes_linear_reference
from tpctl.kernels.linear.codes_ring import (
    CodesRingConfig,
    codes_ring,
    cut_of,
    pick_codes_ring,
    ring_reads,
    takes_ring,
)
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.codes import CodesWeight
from tpctl.layers.weights.codes_cuda import KernelCodesWeight
from tpctl.layers.weights.kernels import GpuFacts, StepState

pytestmark = pytest.mark.gpu

TAKEN = ["gptq", "awq", "fp8 channel"]
CASES = [
    (1, 64, 1024, CodesRingConfig(4, 2, 3, 3)),  # the last program has no second unit
    (1, 32, 2048, CodesRingConfig(2, 8, 1, 2)),
    (2, 48, 1024, CodesRingConfig(4, 1, 2, 2)),
    (3, 48, 1024, CodesRingConfig(2, 2, 3, 2)),  # one of four rows is not there
    (8, 32, 1024, CodesRingConfig(2, 1, 5, 4)),  # more programs than units
]


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRET:
        monkeypatch.setattr(module, "codes_ring_kernel", Threads(module.codes_ring_kernel))


def codes_for(name: str, n: int, k: int, scales: torch.dtype = torch.bfloat16, **options: Any) -> Codes:
    codes = codes_of(name, n, k, **options)
    return replace(codes, scales=codes.scales.to(scales)) if codes.kind == "uint4" else codes


@pytest.mark.parametrize("parts", ["plain", "bias+residual", "norm", "all"])
@pytest.mark.parametrize("rows,out_features,in_features,config", CASES)
@pytest.mark.parametrize("name", TAKEN)
def test_matches_reference(name, rows, out_features, in_features, config, parts):
    weight_rows = 2 * out_features if parts == "all" else out_features
    scales = torch.float16 if parts == "plain" else torch.bfloat16
    codes = codes_for(name, weight_rows, in_features, scales, seed=rows)
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


def test_every_fp8_number_counts():
    """Subnormal ones too, whose bfloat16 forms are."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers & 127 != 127].repeat(17)[: 16 * 256].reshape(16, 256).repeat(1, 4).contiguous()
    scales = torch.ones(16, 1, device=DEVICE)
    codes = Codes("e4m3", 1024, numbers.to(DEVICE).view(torch.float8_e4m3fn), scales, unit=1024)
    x = torch.zeros(1, 1024, dtype=torch.bfloat16, device=DEVICE)
    for at in range(0, 256, 37):
        x.zero_()[0, at] = 1.0
        got = codes_ring(x, codes, config=CodesRingConfig(2, 1, 2, 1))
        assert torch.equal(got.float(), codes.values[:, at].float()[None])


@pytest.mark.parametrize("what", ["linear", "norm", "gated", "add_to"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", TAKEN)
def test_a_weight_takes_it(name, rows, what):
    codes = codes_for(name, 64, 2048)
    facts = GpuFacts(hopper=True, multiprocessors=2, few_rows=16)
    state = StepState(pdl=not INTERPRET)
    kernels, plain = KernelCodesWeight(codes, GemvScratch.allocate(DEVICE), state, facts), CodesWeight(codes)
    assert pick_codes_ring(rows, codes, gated=what == "gated", multiprocessors=2, hopper=True) is not None
    torch.manual_seed(rows)
    dtype = torch.bfloat16
    x, bias = torch.randn(rows, 2048).to(DEVICE, dtype), torch.randn(64).to(DEVICE, dtype)
    norm = RMSNorm(2048, 1e-6, dtype).to(DEVICE)
    norm.weight.copy_(1 + 0.1 * torch.randn(2048))
    if what == "gated":
        got, want = (one.gated(x, bias, "silu", norm) for one in (kernels, plain))
    elif what == "add_to":
        got, want = (torch.ones(rows, 64, device=DEVICE, dtype=dtype) for _ in range(2))
        kernels.add_to(got, x, bias)
        plain.add_to(want, x, bias)
    else:
        got, want = (one.linear(x, bias, norm if what == "norm" else None) for one in (kernels, plain))
    assert relative_error(got, want) < 2e-2  # plain torch rounds in between


def test_what_it_takes():
    for name in KINDS:
        assert takes_ring(codes_for(name, 32, 1024)) == (name in TAKEN)
    assert not takes_ring(codes_of("gptq", 32, 1024))  # scales of float32
    assert not takes_ring(codes_for("gptq", 40, 1024)) and not takes_ring(codes_for("gptq", 32, 1152))
    codes, x = codes_for("gptq", 32, 1024), torch.zeros(2, 1032, device=DEVICE, dtype=torch.bfloat16)
    assert ring_reads(x[:, :1024], x[0], codes)
    assert not ring_reads(x[:, 1:1025], x[0], codes) and not ring_reads(x[:, :1024], x[0, 1:], codes)


def test_what_is_picked():
    def pick(name: str, rows: int, outputs: int = 64, columns: int = 4096, **options: Any) -> CodesRingConfig | None:
        codes = codes_for(name, outputs, columns)
        found = pick_codes_ring(rows, codes, **({"gated": False, "multiprocessors": 2, "hopper": True} | options))
        return found._replace(least=0) if found else None

    assert pick("gptq", 1) == CodesRingConfig(8, 4, 2, 2) == pick("awq", 2)
    assert pick("gptq", 4) == CodesRingConfig(8, 2, 4, 2) and pick("gptq", 7) == CodesRingConfig(8, 1, 8, 2)
    assert pick("gptq", 1, columns=14336) == CodesRingConfig(8, 7, 1, 2)
    assert pick("gptq", 1, 256) == CodesRingConfig(8, 4, 2, 4) and pick("gptq", 2, 256) == CodesRingConfig(8, 4, 2, 2)
    assert pick("fp8 channel", 1) == CodesRingConfig(8, 4, 1, 2) == pick("fp8 channel", 2)
    assert pick("fp8 channel", 1, 256) == CodesRingConfig(4, 8, 1, 4)
    assert pick("fp8 channel", 1, columns=14336) == CodesRingConfig(8, 2, 3, 2)
    assert pick("gptq", 9) is None and pick("gptq", 1, hopper=False) is None and pick("mxfp4", 1) is None
    assert pick("gptq", 1, 16) is None  # one unit for two programs
    assert pick("gptq", 8, columns=14336) is None and pick("fp8 channel", 3, columns=14336) is None  # x is long
    codes = codes_for("gptq", 28672, 4096)
    config = pick_codes_ring(1, codes, gated=True, multiprocessors=132, hopper=True)
    assert config is not None and config[:4] == (8, 4, 2, 264)
    cut = cut_of(1, codes, gated=True, config=config)
    assert (cut.units, cut.bytes) == (7, 87040)


@pytest.mark.parametrize("name", TAKEN)
def test_how_many_programs_fit_a_multiprocessor(name):
    """Llama-8B's linears, by the shared memory that programs take, each a KB more than it asks for."""
    sizes = []
    small = codes_for(name, 16, 1024)
    for outputs, columns, gated in [
        (6144, 4096, False),
        (4096, 4096, False),
        (28672, 4096, True),
        (4096, 14336, False),
    ]:
        held = {
            part: torch.empty(outputs, max(1, one.shape[1] * columns // 1024), dtype=one.dtype, device="meta")
            for part in ("values", "scales", "zeros")
            if (one := getattr(small, part)) is not None
        }
        if name == "fp8 channel":
            held["scales"] = held["scales"][:, :1]
        codes = replace(small, columns=columns, **held)
        gated = outputs == 28672
        config = pick_codes_ring(1, codes, gated=gated, multiprocessors=132, hopper=True)
        assert config is not None
        sizes.append(cut_of(1, codes, gated=gated, config=config).bytes + 1024)
    whole = 228 << 10
    assert [whole // size for size in sizes] == [2, 1, 2, 1]
    following = [*sizes[1:], sizes[0]]
    assert all(one + other <= whole for one, other in zip(sizes, following, strict=True))


def test_without_gluon_the_other_kernel_stays(monkeypatch):
    monkeypatch.setattr(module, "codes_ring_kernel", None)
    assert pick_codes_ring(1, codes_for("gptq", 64, 4096), gated=False, multiprocessors=2, hopper=True) is None


def test_wrong_inputs_are_refused():
    codes, config = codes_for("gptq", 32, 1024), CodesRingConfig(2, 2, 2, 2)
    x = torch.zeros(9, 1024, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="512 columns, the codes 1024"):
        codes_ring(x[:, :512], codes, config=config)
    for wrong in (x, x[:1].float(), x.flatten()[1:1025].view(1, -1)):
        with pytest.raises(ValueError, match="use codes_gemv"):
            codes_ring(wrong, codes, config=config)
    with pytest.raises(ValueError, match="use codes_gemv"):
        codes_ring(x[:2], codes, norm=(x[0], 1e-6), config=config)
    with pytest.raises(ValueError, match="1024 columns and 8 rows cannot be cut by"):
        codes_ring(x[:8], codes, config=config)
