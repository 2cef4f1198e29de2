"""Codes of random weights, for tests of whatever multiplies by them."""

from __future__ import annotations

import torch
from torch import Tensor

from tpctl.kernels.common.codes import PACKED, Codes, Kind


def random_codes(
    kind: Kind,
    n: int,
    k: int,
    *,
    unit: int | None = None,
    rows_unit: int = 1,
    first: int = 0,
    groups: bool = False,
    zeros: bool = False,
    factors: bool = False,
    exponents: bool = False,
    experts: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Codes:
    """W [n, k] with a scale for every ``rows_unit`` outputs and ``unit`` inputs (``None``: all of them), of a size
    that leaves products of normal inputs near 1."""
    rng = torch.Generator().manual_seed(seed)
    unit = k + first if unit is None else unit
    lead = () if experts is None else (experts,)
    grid = (*lead, -(-n // rows_unit), -(-(k + first) // unit))

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=rng).to(dtype)

    if kind in PACKED:
        values, spread = integers(0, 256, (*lead, n, -(-k // 2)), torch.uint8), 4.6
    elif kind == "int8":
        values, spread = integers(-128, 128, (*lead, n, k), torch.int8), 74.0
    else:
        values, spread = torch.randn((*lead, n, k), generator=rng).to(torch.float8_e4m3fn), 1.0
    size = 1 / (spread * k**0.5)
    if exponents:
        scales = integers(-1, 2, grid, torch.int32).add(127 + round(torch.tensor(size).log2().item())).to(torch.uint8)
    else:
        scales = (torch.rand(grid, generator=rng) + 0.5) * size
    held_zeros = None
    if zeros and kind != "e2m1":
        held_zeros = integers(0, 16, grid, torch.uint8) if kind == "uint4" else integers(-9, 9, grid, torch.int32)
        if kind != "uint4":
            held_zeros = held_zeros.to(values.dtype)
    codes = Codes(
        kind,
        k,
        values,
        scales,
        rows=None if rows_unit == 1 else torch.arange(n, dtype=torch.int32) // rows_unit,
        unit=unit,
        first=first,
        groups=integers(0, grid[-1], (k,), torch.int32) if groups else None,
        zero=8 if kind == "uint4" else 0,
        zeros=held_zeros,
        factors=torch.rand((*lead, n), generator=rng) + 0.5 if factors else None,
    )
    return codes if device == "cpu" else on(codes, device)


def on(codes: Codes, device: str) -> Codes:
    moved = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in vars(codes).items()}
    return Codes(**moved)
