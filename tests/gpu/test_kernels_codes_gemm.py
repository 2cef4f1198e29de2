"""Linears of many rows whose weights are codes: rounding x, products in 8 bits, numbers made before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.code_cases import KINDS, codes_of
from tests.gpu.here import DEVICE, DTYPES, INTERPRET, relative_error
from tpctl.kernels.common.codes import decode
from tpctl.kernels.common.launch import shared_memory
from tpctl.kernels.linear.codes_gemm import (
    GemmConfig,
    decode_rows,
    decoded_linear,
    gemm_config,
    pick_way,
    quantize_rows,
    quantize_rows_reference,
    scaled_gemm,
    scaled_gemm_reference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

SCALED = ["fp8 block", "fp8 block, cut inside one", "fp8 channel", "fp8, scales of exponents"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "norm", "offset"])
@pytest.mark.parametrize("columns,block", [(576, 128), (576, None), (64, 64), (200, 32), (1, None)])
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_quantised_rows(kind, columns, block, norm, dtype):
    torch.manual_seed(columns)
    wide = torch.randn(5, columns + 8).to(DEVICE, dtype)
    x = wide[:, :columns]
    x[1] = 0
    weight = (1 + 0.1 * torch.randn(columns)).to(DEVICE, dtype)
    options = {} if norm == "none" else {"norm": (weight, 1e-6), "unit_offset": norm == "offset"}
    q, scales = quantize_rows(x, kind, block, pdl=not INTERPRET, **options)
    want_q, want_scales = quantize_rows_reference(x, kind, block, **options)
    assert q.dtype == want_q.dtype and scales.shape == want_scales.shape
    torch.testing.assert_close(scales, want_scales, rtol=1e-5 if dtype is torch.float32 else 8e-3, atol=0)
    spread = (columns if block is None else block, 1)
    got, want = (
        one.float() * by.repeat_interleave(spread[0], 1)[:, :columns]
        for one, by in ((q, scales), (want_q, want_scales))
    )
    # A number on the border between two is rounded either way.
    assert relative_error(got, want) < (3e-3 if dtype is torch.float32 else 1.5e-2)


@pytest.mark.parametrize("block", [128, None])
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_what_is_no_number_becomes_none(kind, block):
    """Its whole block is not finite: a token of it is an error. Others are what they would be without."""
    torch.manual_seed(1)
    x = torch.randn(4, 256).to(DEVICE, torch.bfloat16)
    sound, _ = quantize_rows(x, kind, block, pdl=not INTERPRET)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    for made in (quantize_rows(x, kind, block, pdl=not INTERPRET), quantize_rows_reference(x, kind, block)):
        q, scales = made
        finite = (q.float() * scales.repeat_interleave(block or 256, 1)).isfinite()
        part = finite[:, : block or 256].all(-1).tolist()
        assert part == [True, False, False, True] and finite[:, block or 256 :].all()
        assert torch.equal(q[[0, 3]].view(torch.uint8), sound[[0, 3]].view(torch.uint8))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows,out_features,columns", [(70, 150, 576), (1, 16, 64), (300, 70, 256)])
@pytest.mark.parametrize("name", [*SCALED, "int8 symmetric"])
def test_products_of_8_bits(name, rows, out_features, columns, bias, tma):
    if name == "int8 symmetric":
        codes = codes_of("int8 channel", out_features, columns, zeros=False)
    else:
        codes = codes_of(name, out_features, columns)
    assert pick_way(513, replace(codes, rounds=True), (9, 0), 132) == "scaled"
    config = gemm_config(codes, rows, (9, 0), shared_memory(DEVICE), 132)._replace(tma=tma)
    if INTERPRET:
        config = config._replace(block_m=64, block_n=64)
    elif tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU copies no tiles by descriptors")
    torch.manual_seed(rows)
    x = torch.randn(rows, columns).to(DEVICE, torch.bfloat16)
    block = None if codes.scales.shape[1] == 1 else config.block_k
    q, scales = quantize_rows(x, codes.kind, block)
    out = torch.full((rows, out_features), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    added = torch.randn(out_features).to(DEVICE, torch.bfloat16) if bias else None
    scaled_gemm(q, scales, codes, config, bias_N=added, out=out, pdl=not INTERPRET)
    want = scaled_gemm_reference(q, scales, codes, block)
    assert relative_error(out, want if added is None else want + added.double()) < 4e-3
    # What rounding x costs: FP8 has 3 bits behind the first.
    assert relative_error(want, x.double() @ decode(codes).double().T) < 0.05


def test_which_way():
    def way(name: str, arch: tuple[int, int] = (9, 0), columns: int = 256, rows: int = 513, **options: Any) -> str:
        codes = replace(codes_of(name, 32, columns, **options), rounds=True)
        return pick_way(rows, codes, arch, 132)

    for name in ("fp8 block", "fp8 channel"):
        assert way(name) == way(name, (8, 9)) == "scaled"
        assert way(name, (8, 0)) == way(name, columns=264) == "decoded"
        assert way(name, (8, 9), rows=512) == way(name, (8, 0), rows=128) == "stored"
        assert way(name, (8, 0), rows=129) == "decoded"
    assert way("int8 channel", (8, 0), zeros=False) == "scaled"
    for name in ("int8 channel", "awq", "mxfp4", "fp8, odd blocks"):
        assert way(name) == "decoded"
    assert [way("fp8 channel", rows=rows) for rows in (16, 17)] == ["stored", "scaled"]
    assert [way("fp8 block", rows=rows) for rows in (32, 33)] == ["stored", "scaled"]
    # Whether x may be rounded is the format's to say; elsewhere there are to be tiles for all programs.
    wide = codes_of("fp8 channel", 128 * 132, 64)
    assert pick_way(9999, wide, (9, 0), 132) == "decoded"
    wide = replace(wide, rounds=True)
    assert [pick_way(rows, wide, (8, 9), 132) for rows in (64, 65)] == ["stored", "scaled"]
    assert pick_way(65, wide, (8, 9), 133) == "stored"


def test_tiles():
    blocks, channel = codes_of("fp8 block", 32, 256), codes_of("fp8 channel", 128 * 132, 64)
    assert gemm_config(blocks, 33, (9, 0), 232448, 132) == GemmConfig(64, 64, 128, 4, 6)
    assert gemm_config(blocks, 513, (9, 0), 232448, 132) == GemmConfig(64, 128, 128, 4, 5)
    assert gemm_config(channel, 64, (9, 0), 232448, 132) == GemmConfig(64, 128, 128, 4, 5)
    assert gemm_config(channel, 65, (9, 0), 232448, 132) == GemmConfig(128, 128, 128, 8, 4)
    assert gemm_config(channel, 65, (8, 9), 101376, 142) == GemmConfig(128, 128, 128, 8, 2, tma=False)
    wide = codes_of("int8 channel", 128 * 132, 64)
    assert gemm_config(wide, 65, (9, 0), 232448, 132) == GemmConfig(128, 256, 128, 8, 4)
    cut = codes_of("fp8 block, cut inside one", 32, 256)
    assert gemm_config(cut, 513, (9, 0), 232448, 132) == GemmConfig(64, 128, 64, 4, 5)


@pytest.mark.parametrize("columns", [576, 321])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_made_before(name, columns):
    codes = codes_of(name, 75, columns)
    got = decode_rows(codes, 3, 75, torch.float32, pdl=not INTERPRET)
    torch.testing.assert_close(got, decode(codes, 3), rtol=1e-6, atol=0)


def test_a_linear_by_parts(monkeypatch):
    codes = codes_of("awq", 75, 256)
    x, bias = torch.randn(9, 256, device=DEVICE), torch.randn(75, device=DEVICE)
    want = x.double() @ decode(codes).double().T
    for most in (1 << 26, 256 * 20):
        monkeypatch.setattr("tpctl.kernels.linear.codes_gemm._DECODED", most)
        assert relative_error(decoded_linear(x, codes), want) < 1e-3
        assert relative_error(decoded_linear(x, codes, bias), want + bias.double()) < 1e-3
