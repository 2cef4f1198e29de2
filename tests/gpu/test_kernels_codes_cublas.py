"""FP8 linears of many rows by cuBLAS: which weights and rows go there, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.code_cases import codes_of
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.kernels.common.codes import Codes, as_floats
from tpctl.kernels.linear.codes_cublas import cublas_linear, cublas_scales, takes_rows
from tpctl.kernels.linear.codes_gemm import quantize_rows, quantize_rows_reference, scaled_gemm_reference

pytestmark = pytest.mark.gpu


def rounding(name: str, n: int = 256, k: int = 512, **options) -> Codes:
    return replace(codes_of(name, n, k, **options), rounds=True)


def test_scales_of_outputs_and_of_blocks() -> None:
    codes = rounding("fp8 channel")
    found = cublas_scales(codes, (9, 0), "13.0")
    assert found is not None and found.block is None
    assert torch.equal(found.scales, codes.scales.T) and found.scales.T.is_contiguous()
    one = replace(codes, scales=codes.scales[:2], rows=torch.arange(256, device=DEVICE) // 128)
    found = cublas_scales(replace(one, factors=torch.full((256,), 2.0, device=DEVICE)), (9, 0), "12.6")
    assert found is not None and found.scales.shape == (1, 256)
    assert torch.equal(found.scales[0], 2 * codes.scales[:2, 0].repeat_interleave(128))
    blocks = rounding("fp8 block")
    found = cublas_scales(blocks, (9, 0), "12.9")
    assert found is not None and found.block == 128 and found.scales.stride() == (1, 4)
    assert torch.equal(found.scales.T, as_floats(blocks.scales))


def test_what_cublas_is_not_asked_for() -> None:
    channel, blocks = rounding("fp8 channel"), rounding("fp8 block")
    for codes, arch, cuda in (
        (replace(channel, rounds=False), (9, 0), "13.0"),
        (channel, (8, 9), "13.0"),
        (channel, (12, 0), "13.0"),
        (channel, (9, 0), None),
        (rounding("fp8 channel", n=264), (9, 0), "13.0"),
        (rounding("int8 channel", zeros=False), (9, 0), "13.0"),
        (blocks, (9, 0), "12.8"),
        (rounding("fp8 block", k=384), (9, 0), "13.0"),
        (rounding("fp8 block", n=192), (9, 0), "13.0"),
        (rounding("fp8 block, cut inside one"), (9, 0), "13.0"),
        (replace(blocks, rows=blocks.rows.flip(0)), (9, 0), "13.0"),
    ):
        assert cublas_scales(codes, arch, cuda) is None


def test_rows() -> None:
    """Those for which our tiles would be more than there are multiprocessors; for blocks, all but those of one tile."""

    def least(outputs: int, block: int | None) -> int:
        codes = replace(rounding("fp8 channel"), values=torch.empty(outputs, 512, device="meta"))
        return next(rows for rows in range(1, 9999) if takes_rows(rows, codes, block, 132))

    assert [least(n, None) for n in (2048, 4096, 5120, 6144, 28672)] == [513, 257, 193, 129, 65]
    assert least(2048, 128) == least(28672, 128) == 65


@pytest.mark.parametrize("rows", [5, 8])
def test_scales_of_all_rows_beside_each_other(rows: int) -> None:
    x = torch.randn(rows, 384).to(DEVICE)
    q, scales = quantize_rows(x, "e4m3", 128, columns_first=True)
    assert q.shape == (8, 384) and scales.shape == (8, 3) and scales.stride() == (1, 8)
    torch.testing.assert_close(scales[:rows], quantize_rows_reference(x, "e4m3", 128)[1], rtol=1e-5, atol=0)


@pytest.mark.skipif(INTERPRET, reason="cuBLAS needs a GPU")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows,k", [(97, 512), (301, 4096), (512, 512), (272, 14336)])
@pytest.mark.parametrize("name", ["fp8 channel", "fp8 block"])
def test_products(name: str, rows: int, k: int, bias: bool) -> None:
    codes = rounding(name, k=k)
    scales = cublas_scales(codes, torch.cuda.get_device_capability(), torch.version.cuda)
    if scales is None:
        pytest.skip("this GPU's linears of many rows are ours")
    torch.manual_seed(rows)
    x = torch.randn(rows, k).to(DEVICE, torch.bfloat16)
    added = torch.randn(256).to(DEVICE, torch.bfloat16) if bias else None
    want = scaled_gemm_reference(*quantize_rows(x, "e4m3", scales.block), codes, scales.block)
    got = cublas_linear(x, codes, scales, added, pdl=True)
    exact = 4e-3 if scales.block is not None or k < 4096 else 8e-3  # sums in the tensor cores have 14 bits
    assert relative_error(got, want if added is None else want + added.double()) < exact
