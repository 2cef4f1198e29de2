"""Quantised weights as a device holds them: codes, and what makes numbers of them.

    W[n, k] = (code[n, k] - zero[r, c]) * scale[r, c] * factor[n]      with r = rows[n], c = (k + first) // unit

Formats of checkpoints differ in how they pack and name this (``arch.formats``); kernels know this one form. A matrix
of a mixture has one more first axis, of experts.

    e4m3    values float8_e4m3fn [N, K]
    int8    values int8 [N, K]
    uint4   values uint8 [N, ceil(K/2)], the code of an even k in the low half of a byte, 0 to 15
    e2m1    values uint8, packed alike: 1 bit of sign, 2 of exponent, 1 of mantissa (OCP Microscaling 1.0, 5.3.3)

Scales are floats, or powers of two as bytes, their exponent plus 127 (e8m0, 5.4.1 there).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["e4m3", "int8", "uint4", "e2m1"]

PACKED: frozenset[Kind] = frozenset(("uint4", "e2m1"))
"""Kinds of which a byte holds two codes."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 stand for; 8 to 15 are the same with a minus."""


@dataclass(frozen=True)
class Codes:
    """W [N, K], or [E, N, K].

    Attributes:
        columns: K.
        values: as ``kind`` has them.
        scales: [R, C] or [E, R, C]; uint8: exponents.
        rows: int32 [N], the row of ``scales`` of each output; ``None``: its own.
        unit: how many inputs a column of ``scales`` is for.
        first: how many inputs of the first column's are not here (a cut inside of it).
        groups: int32 [K] or [E, K], the column of ``scales`` of each input, where they are in no order; else ``None``.
        zero: the code that stands for zero, where it is one for all.
        zeros: as ``scales``, uint8 (uint4), int8 or int16 (int8), or e4m3; ``None``: ``zero`` it is.
        factors: float32 [N] or [E, N].
        rounds: the format has inputs rounded to the same kind of numbers, which products of many rows may use.
    """

    kind: Kind
    columns: int
    values: Tensor
    scales: Tensor
    rows: Tensor | None = None
    unit: int = 1
    first: int = 0
    groups: Tensor | None = None
    zero: int = 0
    zeros: Tensor | None = None
    factors: Tensor | None = None
    rounds: bool = False

    @property
    def outputs(self) -> int:
        """N."""
        return self.values.shape[-2]

    @property
    def nbytes(self) -> int:
        held = (self.values, self.scales, self.rows, self.groups, self.zeros, self.factors)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def of_expert(self, expert: int) -> Codes:
        """The matrix of one expert, as a view."""
        return replace(
            self,
            values=self.values[expert],
            scales=self.scales[expert],
            zeros=None if self.zeros is None else self.zeros[expert],
            groups=None if self.groups is None else self.groups[expert],
            factors=None if self.factors is None else self.factors[expert],
        )

    def between(self, start: int, stop: int) -> Codes:
        """Those of outputs ``start`` to ``stop``, as views."""
        if self.rows is not None:
            scales, zeros = self.scales, self.zeros
        else:
            scales = self.scales[..., start:stop, :]
            zeros = None if self.zeros is None else self.zeros[..., start:stop, :]
        return replace(
            self,
            values=self.values[..., start:stop, :],
            scales=scales,
            rows=None if self.rows is None else self.rows[start:stop],
            zeros=zeros,
            factors=None if self.factors is None else self.factors[..., start:stop],
        )


def decode(codes: Codes, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of outputs ``start`` to ``stop`` of a matrix [N, K], in ``dtype`` [stop - start, K]; computed in
    float32. The reference of every kernel, and what CPUs multiply by."""
    stop = codes.outputs if stop is None else stop
    numbers = _numbers(codes.kind, codes.values[start:stop], codes.columns)
    rows = slice(start, stop) if codes.rows is None else codes.rows[start:stop]
    if codes.zeros is not None:
        numbers = numbers.sub_(_spread(codes, codes.zeros[rows].float()))
    elif codes.zero:
        numbers = numbers.sub_(codes.zero)
    numbers = numbers.mul_(_spread(codes, as_floats(codes.scales[rows])))
    if codes.factors is not None:
        numbers = numbers.mul_(codes.factors[start:stop, None])
    return numbers.to(dtype)


def as_floats(scales: Tensor) -> Tensor:
    """Scales in float32. Of bytes, 255 is no number, and 0 is 2^-127, which float32 has as a subnormal one."""
    if scales.dtype != torch.uint8:
        return scales.float()
    exponents = scales.int()
    floats = (exponents << 23).view(torch.float32)
    floats = torch.where(exponents == 0, torch.full_like(floats, 2.0**-127), floats)
    return torch.where(exponents == 255, torch.full_like(floats, torch.nan), floats)


def _numbers(kind: Kind, values: Tensor, columns: int) -> Tensor:
    """What codes stand for before zeros and scales, in float32 of its own memory."""
    if kind == "int8":
        return values.to(torch.float32, copy=True)
    # A table of what bytes stand for is several times as fast on CPUs as conversions and shifts.
    table = _table(kind, values.device)
    numbers = table.index_select(0, values.view(torch.uint8).int().flatten()).view(torch.float32)
    return numbers.view(len(values), -1)[:, :columns]


@cache
def _table(kind: Kind, device: torch.device) -> Tensor:
    """What each byte stands for: one number, or two, as the parts of a complex one."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    if kind == "e4m3":
        return numbers.view(torch.float8_e4m3fn).float()
    codes = torch.tensor((*E2M1, *(-one for one in E2M1)) if kind == "e2m1" else range(16), dtype=torch.float32)
    low, high = (codes.to(device)[half.int()] for half in (numbers & 15, numbers >> 4))
    return torch.complex(low, high)


def _spread(codes: Codes, columns_nC: Tensor) -> Tensor:
    """[n, C] as [n, K] or what broadcasts to it."""
    if codes.groups is not None:
        return columns_nC[:, codes.groups]
    if columns_nC.shape[1] == 1:
        return columns_nC
    if codes.first == 0:
        return columns_nC.repeat_interleave(codes.unit, dim=1)[:, : codes.columns]
    columns = torch.arange(codes.first, codes.first + codes.columns, device=columns_nC.device) // codes.unit
    return columns_nC[:, columns]
