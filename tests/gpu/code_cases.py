"""Codes of all kinds for kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.here import DEVICE
from tests.unit.random_codes import random_codes
from tpctl.kernels.common.codes import Codes

KINDS: dict[str, dict[str, Any]] = {
    "fp8 block": {"kind": "e4m3", "unit": 128, "rows_unit": 128},
    "fp8 block, cut inside one": {"kind": "e4m3", "unit": 128, "rows_unit": 128, "first": 64},
    "fp8 channel": {"kind": "e4m3"},
    "fp8, scales of exponents": {"kind": "e4m3", "unit": 32, "exponents": True},
    "fp8, odd blocks": {"kind": "e4m3", "unit": 24, "first": 5},
    "int8 channel": {"kind": "int8", "zeros": True, "factors": True},
    "int8 groups": {"kind": "int8", "unit": 16},
    "awq": {"kind": "uint4", "unit": 128, "zeros": True},
    "gptq": {"kind": "uint4", "unit": 128},
    "gptq, groups in any order": {"kind": "uint4", "unit": 32, "groups": True, "zeros": True},
    "int4, groups of 32": {"kind": "uint4", "unit": 32, "zeros": True},
    "int4, groups of 64": {"kind": "uint4", "unit": 64, "first": 32},
    "int4, cut inside a byte's group": {"kind": "uint4", "unit": 10, "first": 3},
    "int4 channel": {"kind": "uint4"},
    "mxfp4": {"kind": "e2m1", "unit": 32, "exponents": True},
    "nvfp4": {"kind": "e2m1", "unit": 16, "factors": True},
    "fp4 tensor": {"kind": "e2m1", "rows_unit": 1000},
}


def codes_of(name: str, n: int, k: int, **options: Any) -> Codes:
    codes = random_codes(n=n, k=k, device=str(DEVICE), **(KINDS[name] | options))
    if codes.zeros is not None and codes.kind == "int8":  # of codes that were 0 to 255, one more
        codes = replace(codes, zeros=codes.zeros.to(torch.int16) + 120)
    if name == "nvfp4":  # scales of a byte, and one of each row that brings them there
        return replace(codes, scales=(codes.scales * 256).to(torch.float8_e4m3fn))
    return codes


def widened(value: Any) -> Any:
    if isinstance(value, tuple):
        return (value[0].double(), value[1])
    return value.double() if isinstance(value, torch.Tensor) else value
