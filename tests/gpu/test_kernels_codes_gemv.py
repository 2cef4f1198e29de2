"""Linears of few rows that read codes into registers, against what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.code_cases import KINDS, codes_of, widened
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.kernels.linear.codes_gemv import CodesGemvConfig, codes_gemv, gemv_form, pick_codes_gemv
from tpctl.kernels.linear.codes_linear import codes_linear_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

REFUSED = {"fp8, odd blocks", "gptq, groups in any order", "int4, cut inside a byte's group"}
TAKEN = [name for name in KINDS if name not in REFUSED]
CASES = [
    (1, 44, 1024, CodesGemvConfig(16, 2, 2)),
    (3, 40, 1184, CodesGemvConfig(32, 4, 1)),  # rows that no number of tiles ends with
    (13, 40, 512, CodesGemvConfig(16, 2, 3)),
    (8, 33, 256, CodesGemvConfig(16, 1, 8)),  # further ahead than there are tiles
]


@pytest.mark.parametrize("parts", ["plain", "bias+residual", "norm", "all"])
@pytest.mark.parametrize("rows,out_features,in_features,config", CASES)
@pytest.mark.parametrize("name", TAKEN)
def test_matches_reference(name, rows, out_features, in_features, config, parts):
    weight_rows = 2 * out_features if parts == "all" else out_features
    codes = codes_of(name, weight_rows, in_features, seed=rows)
    torch.manual_seed(rows)
    dtype = torch.bfloat16
    x = torch.randn(rows, in_features).to(DEVICE, dtype)
    options: dict[str, Any] = {}
    if parts in ("bias+residual", "all"):
        options["bias_O"] = torch.randn(weight_rows).to(DEVICE, dtype)
        options["residual_TO"] = torch.randn(rows, out_features).to(DEVICE, dtype)
    if parts in ("norm", "all"):
        options["norm"] = ((1 + 0.1 * torch.randn(in_features)).to(DEVICE, dtype), 1e-6)
        options["unit_offset"] = parts == "all"
    if parts == "all":
        options["activation"] = "silu"
    want = codes_linear_reference(x.double(), codes, **{key: widened(value) for key, value in options.items()})
    out = torch.full((rows, out_features), float("nan"), device=DEVICE, dtype=dtype)
    codes_gemv(x, codes, out=out, config=config, pdl=not INTERPRET, **options)
    assert relative_error(out, want) < 8e-3


def test_what_it_takes():
    for name in KINDS:
        assert (gemv_form(codes_of(name, 32, 512)) is None) == (name in REFUSED)
    assert gemv_form(codes_of("gptq", 32, 528)) is None  # 264 bytes
    form, parts = gemv_form(codes_of("nvfp4", 32, 512)) or (None, 0)
    assert form is not None and (form.mode, parts) == ("inside", 2)


def test_what_is_picked():
    def pick(name: str, rows: int, outputs: int = 64, **options: Any) -> CodesGemvConfig | None:
        codes = codes_of(name, outputs, 256)
        return pick_codes_gemv(rows, codes, **({"gated": False, "multiprocessors": 2, "hopper": True} | options))

    assert pick("gptq", 8) == CodesGemvConfig(16, 8, 4) == pick("fp8 channel", 1)
    assert pick("gptq", 1, 65) == CodesGemvConfig(16, 4, 8)
    assert pick("gptq", 1, gated=True) == CodesGemvConfig(16, 4, 4, 168)
    assert pick("fp8 channel", 16) == CodesGemvConfig(16, 8, 2)
    assert pick("gptq", 9) is None and pick("fp8 channel", 9, gated=True) is None
    assert pick("fp8 channel", 17) is None and pick("fp8 channel", 1, hopper=False) is None


def test_wrong_inputs_are_refused():
    codes, config = codes_of("gptq", 32, 256), CodesGemvConfig(16, 2, 2)
    with pytest.raises(ValueError, match="320 columns, the codes 256"):
        codes_gemv(torch.zeros(1, 320, device=DEVICE, dtype=torch.bfloat16), codes, config=config)
    with pytest.raises(ValueError, match=r"1 rows of torch\.float32 and such uint4 codes: use codes_linear"):
        codes_gemv(torch.zeros(1, 256, device=DEVICE), codes, config=config)
