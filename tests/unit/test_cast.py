"""Casts are torch's, bit for bit, over every 16-bit pattern and hard 32-bit ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpctl.checkpoint.cast import cast, check_range

EIGHT = {"F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn}
TORCH = EIGHT | {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check(bits: np.ndarray, source: str, target: str) -> None:
    """Compare with torch; of a NaN only that it is one, since torch's own code paths differ in its payload."""
    data = bits.view(np.uint8).reshape(1, -1)
    wide = torch.from_numpy(data.copy()).view(TORCH[source])
    wanted = wide.to(TORCH[target])
    found = torch.from_numpy(cast(data, source, target).copy()).view(TORCH[target])
    nan = wide.isnan()
    assert torch.equal(found.isnan(), nan)
    size = found.element_size()
    kind = {2: torch.int16, 4: torch.int32}[size]
    assert torch.equal(found.view(kind)[~nan], wanted.view(kind)[~nan])


@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_every_16_bit_pattern(source: str, target: str) -> None:
    check(np.arange(1 << 16, dtype=np.uint16), source, target)


@pytest.mark.parametrize("source", EIGHT)
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_every_8_bit_pattern(source: str, target: str) -> None:
    bits = np.arange(1 << 8, dtype=np.uint8)
    check(bits, source, target)
    out = cast(bits, source, target)
    check_range(bits, out, source, target, "w")  # all of them hold every value, and exactly
    back = torch.from_numpy(out.copy()).view(TORCH[target]).to(EIGHT[source]).view(torch.uint8)
    number = ~torch.from_numpy(bits.copy()).view(EIGHT[source]).float().isnan()
    assert torch.equal(back[number], torch.from_numpy(bits.copy())[number])


def hard_floats() -> np.ndarray:
    """Every BF16 and F16 value in F32, its neighbours, and the midpoints to the next one: where rounding decides."""
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bf16 = (tops[:, None] | lows).ravel()
    with np.errstate(invalid="ignore"):
        half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ties = np.array([0, 0xFFF, 0x1000, 0x1001], np.uint32)
    return np.concatenate([bf16, (half[:, None] + ties).ravel()])


@pytest.mark.parametrize("target", ["F16", "BF16", "F32"])
def test_hard_32_bit_values(target: str) -> None:
    check(hard_floats(), "F32", target)


@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_random_64_bit_values(bits: list[int]) -> None:
    for target in ("F32", "F16", "BF16"):
        check(np.array(bits, np.uint64), "F64", target)


def test_leading_axes_are_kept() -> None:
    data = np.zeros((3, 8), np.uint8)
    assert cast(data, "F32", "BF16").shape == (3, 4)
    assert cast(data, "BF16", "F32").shape == (3, 16)
    assert cast(data, "BF16", "BF16") is data
