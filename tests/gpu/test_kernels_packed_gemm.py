"""Four bits of some hundred rows, made into numbers on their way to the tensor cores: against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.code_cases import codes_of
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.kernels.common.codes import Codes, decode
from tpctl.kernels.common.launch import capability
from tpctl.kernels.linear.packed_gemm import PackedConfig, packed_form, packed_gemm, pick_packed, take_apart

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

HOPPER = (9, 0)
TAKEN = ["awq", "gptq", "int4 channel"]
OTHERS = ["gptq, groups in any order", "int4, groups of 32", "int4, groups of 64", "mxfp4", "int8 groups", "fp8 block"]


def pick(rows: int, codes: Codes, multiprocessors: int = 2, arch: tuple[int, int] = HOPPER) -> PackedConfig | None:
    return pick_packed(rows, codes, arch, multiprocessors)


def test_even_inputs_first() -> None:
    x = torch.randn(3, 2200).to(DEVICE, torch.bfloat16)
    assert torch.equal(take_apart(x), torch.cat([x[:, ::2], x[:, 1::2]], 1))
    assert torch.equal(take_apart(x[:, 200:]), torch.cat([x[:, 200::2], x[:, 201::2]], 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [33, 100, 250])
@pytest.mark.parametrize("name", TAKEN)
def test_products(name: str, rows: int, bias: bool) -> None:
    if not INTERPRET and capability(DEVICE)[0] != 9:
        pytest.skip("such tiles are for Hopper's tensor cores")
    torch.manual_seed(rows)
    codes = codes_of(name, 200, 512)
    config = pick(rows, codes)
    assert config is not None
    x = torch.randn(rows, 512).to(DEVICE, torch.bfloat16)
    added = torch.randn(200).to(DEVICE, torch.bfloat16) if bias else None
    want = x.double() @ decode(codes).double().T + (0 if added is None else added.double())
    assert relative_error(packed_gemm(x, codes, config, bias_N=added, pdl=not INTERPRET), want) < 5e-3


@pytest.mark.parametrize("rows,split,bias", [(40, 2, True), (150, 3, False)])
def test_an_input_in_parts(rows: int, split: int, bias: bool) -> None:
    """Of which the last may have fewer tiles."""
    if not INTERPRET and capability(DEVICE)[0] != 9:
        pytest.skip("such tiles are for Hopper's tensor cores")
    torch.manual_seed(rows)
    codes = codes_of("awq", 200, 896)
    config = pick(rows, codes)
    assert config is not None
    x = torch.randn(rows, 896).to(DEVICE, torch.bfloat16)
    added = torch.randn(200).to(DEVICE, torch.bfloat16) if bias else None
    want = x.double() @ decode(codes).double().T + (0 if added is None else added.double())
    got = packed_gemm(x, codes, config._replace(split=split), bias_N=added, pdl=not INTERPRET)
    assert relative_error(got, want) < 5e-3


def test_which_inputs_are_cut() -> None:
    """The long ones of outputs that do not fill the device, where their parts do."""

    def parts(outputs: int, columns: int, rows: int) -> int:
        values = torch.empty(outputs, columns // 2, dtype=torch.uint8, device="meta")
        config = pick(rows, replace(codes_of("gptq", 256, 512), values=values, columns=columns), 132)
        return 0 if config is None else config.split

    assert [parts(28672, 4096, rows) for rows in (64, 256, 512)] == [1, 1, 1]
    assert [parts(4096, 14336, rows) for rows in (32, 64, 128, 256, 272, 512)] == [0, 4, 4, 4, 0, 2]
    assert parts(6144, 4096, 256) == parts(4096, 4096, 256) == parts(1024, 14336, 256) == 0


def test_rows_and_matrices() -> None:
    codes = codes_of("gptq", 256, 512)
    assert [rows for rows in range(999) if pick(rows, codes) is not None] == [*range(33, 257), *range(449, 513)]
    assert pick(100, codes, multiprocessors=3) is None  # too few outputs to fill the device
    assert pick(100, codes, arch=(8, 0)) is None and pick(100, codes, arch=(12, 0)) is None


@pytest.mark.parametrize("name", OTHERS)
def test_codes_of_another_way(name: str) -> None:
    codes = codes_of(name, 256, 512)
    assert packed_form(codes, 64) is None and pick(100, codes) is None


def test_rows_that_tiles_do_not_fit() -> None:
    codes = codes_of("gptq", 256, 512)
    assert packed_form(replace(codes, columns=448), 64) is None
