"""Linears that read codes, with their fused parts, against what the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.code_cases import KINDS, codes_of, widened
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.kernels.collective import all_reduce
from tpctl.kernels.collective.all_reduce import PeerBuffer, PeerLayout
from tpctl.kernels.collective.all_reduce_kernels import EMPTY
from tpctl.kernels.common.codes import decode
from tpctl.kernels.common.launch import is_hopper
from tpctl.kernels.linear.codes_linear import (
    CodesConfig,
    codes_linear,
    codes_linear_reference,
    form_of,
    pick_codes,
)
from tpctl.kernels.linear.gemv import GemvScratch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

MODES = {
    "fp8 block": "tile", "fp8 channel": "end", "fp8, odd blocks": "each", "awq": "tile", "mxfp4": "inside",
    "gptq, groups in any order": "each", "int4, groups of 64": "tile", "int4, groups of 32": "inside",
}  # fmt: skip
SHAPES = [(1, 101, 576), (1, 64, 1024), (3, 140, 321), (16, 70, 320), (33, 66, 192)]
CONFIGS = [CodesConfig(8, 64, 64), CodesConfig(16, 32, 32, split_k=3, num_stages=2, prefetch=256), None]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["plain", "bias+residual", "norm", "norm+gated", "all"])
@pytest.mark.parametrize("rows,out_features,in_features", SHAPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", KINDS)
def test_matches_reference(name, config, rows, out_features, in_features, parts, dtype):
    gated = parts in ("norm+gated", "all")
    weight_rows = 2 * out_features if gated else out_features
    codes = codes_of(name, weight_rows, in_features, seed=rows)
    if config is None:
        packed = codes.kind in ("uint4", "e2m1")
        config = pick_codes(
            rows, out_features, in_features, packed=packed, gated=gated, multiprocessors=132, large=is_hopper(DEVICE)
        )
        assert config is not None
    torch.manual_seed(rows + out_features)
    x = torch.randn(rows, in_features).to(DEVICE, dtype)
    options: dict[str, Any] = {}
    if parts in ("bias+residual", "all"):
        options = {
            "bias_O": torch.randn(weight_rows).to(DEVICE, dtype),
            "residual_TO": torch.randn(rows, out_features).to(DEVICE, dtype),
        }
    if "norm" in parts or parts == "all":
        options["norm"] = ((1 + 0.1 * torch.randn(in_features)).to(DEVICE, dtype), 1e-6)
        options["unit_offset"] = parts == "all"
    if gated:
        options["activation"] = "silu"
    wide = {key: widened(value) for key, value in options.items()}
    want = codes_linear_reference(x.double(), codes, **wide)
    scratch = GemvScratch.allocate(DEVICE)
    for _ in range(2):
        out = torch.full((rows, out_features), float("nan"), device=DEVICE, dtype=dtype)
        codes_linear(x, codes, scratch, out=out, config=config, pdl=not INTERPRET, **options)
        assert relative_error(out, want) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    assert (scratch.counters == 0).all()


@pytest.mark.parametrize("name", MODES)
def test_where_scales_come_in(name):
    codes = codes_of(name, 130, 576)
    form, tile, groups = form_of(codes, 64, fast=True)
    assert form.mode == MODES[name]
    assert form.fast == (form.mode != "each")
    if form.mode in ("tile", "inside"):
        assert form.scale_bytes % (tile // groups) == 0


@pytest.mark.parametrize("name", ["fp8 channel", "int8 channel", "gptq", "mxfp4", "nvfp4"])
def test_numbers_are_exact(name):
    """Rows of a unit matrix give the numbers themselves, all that a code can be; those here are exact in bfloat16."""
    codes = codes_of(name, 256, 64, factors=False)
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None].expand(codes.values.shape).contiguous()
    if codes.kind == "e4m3":
        every[every & 127 == 127] = 0  # no number
    scales = codes.scales
    if scales.is_floating_point() and scales.dtype != torch.float8_e4m3fn:
        scales = torch.exp2(scales.log2().round())
    codes = replace(codes, values=every.view(codes.values.dtype), scales=scales)
    x = torch.eye(64, dtype=torch.bfloat16, device=DEVICE)
    got = codes_linear(x, codes, GemvScratch.allocate(DEVICE), config=CodesConfig(64, 64, 32))
    assert torch.equal(got.float(), decode(codes).T)


def test_an_expert_s_matrix():
    codes = codes_of("awq", 70, 256, experts=3).of_expert(2)
    x = torch.randn(2, 256, device=DEVICE)
    got = codes_linear(x, codes, GemvScratch.allocate(DEVICE), config=CodesConfig(8, 64, 64))
    assert relative_error(got, codes_linear_reference(x.double(), codes)) < 1e-5


def test_rows_of_a_wider_tensor():
    codes = codes_of("gptq", 70, 256)
    wide = torch.randn(5, 300, device=DEVICE, dtype=torch.bfloat16)
    for x in (wide[:, 2:258], wide[:, 1:257]):
        got = codes_linear(x, codes, GemvScratch.allocate(DEVICE), config=CodesConfig(8, 64, 64))
        assert relative_error(got, codes_linear_reference(x.double(), codes)) < 4e-3


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("name", ["awq", "fp8 block"])
def test_sends_what_it_computes(name, split, monkeypatch):
    """Two ranks of one process, one after the other: both linears have sent before the first all-reduce runs."""
    monkeypatch.setattr(all_reduce, "_MAX_POLLS", 3)
    rows, outputs, dtype = 5, 90, DTYPES[INTERPRET]
    layout = PeerLayout.of(8, outputs, dtype)
    buffers = [torch.full((layout.words(2),), EMPTY, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    ends = [PeerBuffer(rank, pointers, layout, dtype) for rank in range(2)]
    scratch, config = GemvScratch.allocate(DEVICE), CodesConfig(8, 64, 64, split)
    for seed in range(3):
        x = torch.randn(2, rows, 256).to(DEVICE, dtype)
        parts = [
            codes_linear(x[rank], codes_of(name, outputs, 256, seed=seed + rank), scratch, config=config, outlet=end)
            for rank, end in enumerate(ends)
        ]
        want = sum(part.double() for part in parts)
        norm, old = (
            torch.ones(outputs, device=DEVICE, dtype=dtype),
            torch.zeros(rows, outputs, device=DEVICE, dtype=dtype),
        )
        for end, part in zip(ends, parts, strict=True):
            residual = old.clone()
            end.all_reduce_add_rms_norm(part, residual, norm, 1e-6, sent=True)
            assert relative_error(residual, want) < (1e-6 if dtype is torch.float32 else 8e-3)
    assert not any(end.timed_out() for end in ends)
    odd = codes_of(name, 91, 256)
    with pytest.raises(ValueError, match="91 features cannot be sent in pairs"):
        codes_linear(x[0], odd, scratch, config=config, outlet=ends[0])


def test_wrong_sizes_are_refused():
    codes, scratch = codes_of("gptq", 70, 256), GemvScratch.allocate(DEVICE, partial_elements=1)
    with pytest.raises(ValueError, match="320 columns, the codes 256"):
        codes_linear(torch.zeros(1, 320, device=DEVICE), codes, scratch, config=CodesConfig(8, 64, 64))
    with pytest.raises(ValueError, match="142 partial sums exceed the scratch of 1"):
        codes_linear(torch.zeros(1, 256, device=DEVICE), codes, scratch, config=CodesConfig(8, 64, 64, split_k=2))
