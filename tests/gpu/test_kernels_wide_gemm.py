"""Four bits of some hundred rows, in Gluon: against plain torch on Hopper, and on any processor with what stands for
its language."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.code_cases import codes_of
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.kernels.common.activation import act_and_mul_reference
from tpctl.kernels.common.codes import Codes, decode
from tpctl.kernels.common.launch import is_hopper
from tpctl.kernels.common.norm import rms_norm_reference
from tpctl.kernels.linear import wide_gemm as module
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.kernels.linear.wide_gemm import WideConfig, has_gluon, pick_wide, reorder, wide_form, wide_gemm
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights import codes_cuda
from tpctl.layers.weights.codes import CodesWeight
from tpctl.layers.weights.codes_cuda import KernelCodesWeight
from tpctl.layers.weights.kernels import GpuFacts, StepState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gluon(), reason="this Triton's Gluon is another"),
    pytest.mark.usefixtures("assembly"),
]

SCRATCH = GemvScratch.allocate(DEVICE)
TAKEN = ["awq", "gptq", "int4 channel"]
OTHERS = ["gptq, groups in any order", "int4, groups of 32", "int4, groups of 64", "mxfp4", "int8 groups", "fp8 block"]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, or in the interpreter its code with what stands for Gluon."""
    if not INTERPRET:
        if not is_hopper(DEVICE):
            pytest.skip("for Hopper")
        return
    from tests.gpu.gluon_stand_in import Descriptor, Pointer, launch
    from tpctl.kernels.linear import wide_gemm_kernels as kernels

    def stands_for(one: Any) -> Any:
        if isinstance(one, Tensor):
            return Pointer(one)
        return Descriptor(one.base, one.block_shape) if hasattr(one, "block_shape") else one

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def run(*given: Any, num_warps: int, **constants: Any) -> None:
                launch(kernels, "wide_gemm_kernel", *grid, *map(stands_for, given), **constants)

            return run

    monkeypatch.setattr(module, "wide_gemm_kernel", Kernel())


def inputs(rows: int, columns: int) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, columns).to(DEVICE, torch.bfloat16)


def numbers(count: int) -> Tensor:
    return torch.randn(count).to(DEVICE, torch.bfloat16)


def test_order_of_inputs() -> None:
    """By bits of an input's place in its group: q q w w e p h before, p w w h q q e after."""
    x = inputs(3, 640)
    for one in (x, x[:, 128:]):
        groups = one.reshape(3, -1, 4, 4, 2, 2, 2)
        assert torch.equal(reorder(one), groups.permute(0, 1, 5, 3, 6, 2, 4).flatten(1))


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("columns", [128, 640, 4096])
def test_a_norm_before(columns: int, unit_offset: bool) -> None:
    x, weight = inputs(3, columns), numbers(columns)
    want = rms_norm_reference(x, weight, 1e-5, unit_offset=unit_offset)
    got = reorder(x, norm=(weight, 1e-5), unit_offset=unit_offset)
    assert relative_error(got, reorder(want)) < 3e-3


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows,config", [
    (33, WideConfig(64, 2, 4)),
    (100, WideConfig(64, 2, 2)),
    (100, WideConfig(128, 1, 3)),
    (250, WideConfig(256, 2, 2)),
    (140, WideConfig(64, 1, 5)),
    (60, WideConfig(64, 2, 3, 0)),
    (100, WideConfig(64, 1, 2, 0)),
    (250, WideConfig(128, 2, 2, 0)),
])  # fmt: skip
@pytest.mark.parametrize("name", TAKEN)
def test_products(name: str, rows: int, config: WideConfig, bias: bool) -> None:
    """Of outputs and rows that no tile divides."""
    codes, x = codes_of(name, 200, 512), inputs(rows, 512)
    added = numbers(200) if bias else None
    want = x.double() @ decode(codes).double().T + (0 if added is None else added.double())
    assert relative_error(wide_gemm(x, codes, SCRATCH, config, bias_N=added, pdl=not INTERPRET), want) < 5e-3
    assert not SCRATCH.counters.any()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows,split,bias", [(40, 2, True), (150, 3, False)])
def test_inputs_in_parts(rows: int, split: int, bias: bool) -> None:
    """Of which the last may have fewer groups."""
    codes, x = codes_of("awq", 200, 896), inputs(rows, 896)
    added = numbers(200) if bias else None
    want = x.double() @ decode(codes).double().T + (0 if added is None else added.double())
    residual = inputs(rows, 200)
    got = wide_gemm(
        x, codes, SCRATCH, WideConfig(64, 2, 3, split), bias_N=added, residual_TN=residual, pdl=not INTERPRET
    )
    assert relative_error(got, want + residual.double()) < 5e-3


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("warpgroups", [1, 2])
def test_a_gate_and_its_up(warpgroups: int, activation: str, split: int) -> None:
    codes, x, added = codes_of("gptq", 2 * 104, 512), inputs(70, 512), numbers(2 * 104)
    linear = x.double() @ decode(codes).double().T + added.double()
    want = act_and_mul_reference(linear, activation=activation)  # type: ignore[arg-type]
    config = WideConfig(128, warpgroups, 3, split)
    got = wide_gemm(x, codes, SCRATCH, config, bias_N=added, activation=activation, pdl=not INTERPRET)  # type: ignore[arg-type]
    assert got.shape == (70, 104) and relative_error(got, want) < 1e-2


@pytest.mark.usefixtures("kernel")
def test_adds_to_what_is_there() -> None:
    codes, x, residual = codes_of("gptq", 136, 256), inputs(50, 256), inputs(50, 136)
    want = x.double() @ decode(codes).double().T + residual.double()
    got = wide_gemm(x, codes, SCRATCH, WideConfig(64, 2, 3), residual_TN=residual, out=residual, pdl=not INTERPRET)
    assert got is residual and relative_error(residual, want) < 5e-3


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("name", ["gptq", "int4 channel"])
def test_rows_of_scales_and_factors(name: str, split: int) -> None:
    codes, x = codes_of(name, 200, 512), inputs(40, 512)
    order = torch.randperm(200).int().to(DEVICE)
    codes = replace(codes, rows=order, factors=torch.rand(200).to(DEVICE) + 0.5)
    want = x.double() @ decode(codes).double().T
    assert relative_error(wide_gemm(x, codes, SCRATCH, WideConfig(64, 2, 3, split), pdl=not INTERPRET), want) < 5e-3


@pytest.mark.usefixtures("kernel")
def test_a_weight_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may stand around a linear."""
    monkeypatch.setattr(codes_cuda, "pick_wide", lambda *_, **__: WideConfig(64, 2, 3, 0))
    codes, x, bias, before = codes_of("awq", 256, 256), inputs(60, 256), numbers(256), inputs(60, 256)
    facts = GpuFacts(hopper=True, multiprocessors=2, few_rows=16)
    weight, plain = KernelCodesWeight(codes, SCRATCH, StepState(pdl=not INTERPRET), facts), CodesWeight(codes)
    norm = RMSNorm(256, 1e-6, torch.bfloat16).to(DEVICE)
    norm.weight.copy_(1 + 0.1 * torch.randn(256))
    assert isinstance(weight._way(x), WideConfig)
    assert relative_error(weight.linear(x, bias, norm), plain.linear(x, bias, norm)) < 1e-2
    assert relative_error(weight.gated(x, bias, "silu", norm), plain.gated(x, bias, "silu", norm)) < 1e-2
    assert relative_error(weight.partial(x, None), plain.partial(x, None)) < 1e-2
    got, want = before.clone(), before.clone()
    weight.add_to(got, x, bias)
    plain.add_to(want, x, bias)
    assert relative_error(got, want) < 1e-2
    odd = torch.randn(60, 257).to(DEVICE, torch.bfloat16)[:, 1:]
    assert not isinstance(weight._way(odd), WideConfig)  # whose rows cannot be read in words of two


@pytest.mark.parametrize("name", OTHERS)
def test_codes_of_another_way(name: str) -> None:
    codes = codes_of(name, 256, 512)
    assert wide_form(codes) is None and picked(100, 1 << 16, 512, codes) is None
    with pytest.raises(ValueError, match="codes"):
        wide_gemm(inputs(40, 512), codes, SCRATCH, WideConfig(64, 2, 3))


def picked(rows: int, outputs: int, columns: int, codes: Codes | None = None, *, hopper: bool = True) -> Any:
    """For a matrix of this size."""
    codes = codes_of("gptq", 256, 512) if codes is None else codes
    values = torch.empty(outputs, columns // 2, dtype=codes.values.dtype, device="meta")
    return pick_wide(rows, replace(codes, values=values, columns=columns), multiprocessors=132, hopper=hopper)


def test_which_are_cut_how() -> None:
    """Outputs that fill the device are shared out, of others the inputs are cut where that leaves little idle."""

    def cuts(outputs: int, columns: int) -> list[tuple[int, ...] | None]:
        found = [picked(rows, outputs, columns) for rows in (64, 128, 256, 384, 512)]
        return [None if one is None else (one.rows, one.warpgroups, one.split) for one in found]

    assert cuts(28672, 4096) == [(64, 2, 0), (128, 2, 0), (256, 2, 0), (128, 2, 0), (256, 2, 0)]
    assert cuts(4096, 14336) == [(64, 2, 4), (128, 1, 2), (256, 1, 2), (128, 2, 1), (128, 2, 1)]
    assert cuts(4096, 4096) == cuts(4096, 14336)
    assert cuts(6144, 4096) == [(64, 2, 2), (128, 1, 1), (256, 1, 1), (128, 2, 0), (128, 2, 0)]
    assert cuts(2048, 4096) == [None] * 5
    assert picked(100, 4096, 4096, hopper=False) is None
    assert [picked(rows, 28672, 4096) is None for rows in (32, 33, 512, 513)] == [True, False, False, True]


def test_rows_that_groups_do_not_fit() -> None:
    codes = codes_of("gptq", 256, 512)
    assert wide_form(replace(codes, columns=448)) is None
