"""Rows of a weight as numbers of few bits and their scales, bit for bit as compressed-tensors calibrates and rounds.

With W the values of a cell that shares a scale, in the weight's dtype (bfloat16, float16 or float32), and [x] the value
of that dtype nearest to x (of two the even one):

    scale  = [max |W| / limit], or the dtype's epsilon where that is 0         limit: 448 for e4m3fn, 7.5 for int4
    number = the nearest number, of two the even one, to [W / scale] + 0 clamped to -448…448, or to -8…7

The 0 is the zero point, which makes -0 a 0. A quotient is thus rounded twice, once to the weight's dtype, which is what
the package does. The second rounding has at most 2^16 inputs, so it is a table. A float32 quotient comes to that many
by rounding to odd: it is cut to bfloat16, and what was cut off sets the lowest bit. bfloat16 has more than two bits
beyond those of the numbers, so the table finds the same one as for the whole quotient (Boldo and Melquiond, "Emulation
of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpctl.checkpoint.cast import LARGEST, cast
from tpctl.errors import CheckpointError
from tpctl.partition.dtypes import TORCH_NAMES
from tpctl.quantizing.schemes import Scheme

Bits = NDArray[np.unsignedinteger[Any]]
Bytes = NDArray[np.uint8]
Values = NDArray[np.float32]

_TILE = 1 << 17
"""Values whose quotients are made at a time: what is made of them fits into a core's cache."""


@dataclass(frozen=True)
class _Float:
    """A dtype's elements as unsigned integers: all bits but the sign, the bits of infinity; and its epsilon."""

    element: str
    magnitude: int
    infinity: int
    epsilon: float


_FLOATS = {
    "BF16": _Float("<u2", 0x7FFF, 0x7F80, 2.0**-7),
    "F16": _Float("<u2", 0x7FFF, 0x7C00, 2.0**-10),
    "F32": _Float("<u4", 0x7FFFFFFF, 0x7F800000, 2.0**-23),
}


@dataclass(frozen=True)
class Loss:
    """What rounding has changed: sums of squares of the differences and of the values, and the largest difference."""

    difference: float = 0.0
    value: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.difference + other.difference, self.value + other.value, max(self.largest, other.largest))


@dataclass(frozen=True)
class QuantisedRows:
    """Rows as they are stored: ``numbers`` (e4m3fn, or int4 in pairs), ``scales`` in the weight's dtype."""

    numbers: Bytes
    scales: Bytes
    loss: Loss


def elements(data: Bytes, dtype: str) -> Bits:
    """The elements of ``data`` as unsigned integers."""
    found: Bits = data.view(_FLOATS[dtype].element)
    return found


def check_finite(bits: Bits, dtype: str, name: str) -> None:
    """Raise ``CheckpointError`` if an element of ``bits`` is NaN or infinite."""
    kind = _FLOATS[dtype]
    if bits.size and int((bits & bits.dtype.type(kind.magnitude)).max()) >= kind.infinity:
        raise CheckpointError(f"{name} holds NaN or infinity, which cannot be quantised; fetch the model again")


def quantise_rows(bits: Bits, dtype: str, scheme: Scheme, name: str) -> QuantisedRows:
    """Quantise rows of the weight ``name``.

    Args:
        bits: [rows, columns], elements of ``dtype``. Of a scheme with blocks these are whole blocks side by side, but
            for the weight's end; of others, whole rows.

    Raises:
        CheckpointError: a value is NaN or infinite, or so large that a number times its scale could be.
    """
    peaks = _peaks(bits, dtype, scheme)
    check_finite(peaks, dtype, name)
    scales, stored = _scales(peaks, dtype, scheme.limit)
    if float(scales.max()) * ceil(scheme.limit) > LARGEST[dtype]:
        raise CheckpointError(
            f"{name} holds values so near to the largest {TORCH_NAMES[dtype]} ({LARGEST[dtype]:g}) that rounding makes "
            "them infinite; leave out --quantize"
        )
    numbers = np.empty(bits.shape, np.uint8)
    loss = Loss()
    step = max(1, _TILE // bits.shape[1])
    for start in range(0, len(bits), step):
        rows = slice(start, start + step)
        values = _float32(bits[rows], dtype)
        held = scales if scheme.rows > 1 else scales[rows]
        part, scale = _aligned(values, held, scheme)
        rounded = _table(dtype, scheme.kind).take(_indices(part / scale, dtype), mode="clip")
        numbers[rows] = rounded.astype(np.uint8).reshape(values.shape)
        rounded &= np.uint32(0xFFFFFF00)
        loss += _loss(part, rounded.view("<f4") * scale)
    if scheme.bits == 4:
        numbers = _in_pairs(numbers)
    return QuantisedRows(numbers, stored, loss)


def _peaks(bits: Bits, dtype: str, scheme: Scheme) -> Bits:
    """The bits of the largest magnitude of each cell [cells, cells of a row]; floats are ordered as their bits are."""
    magnitudes = bits & bits.dtype.type(_FLOATS[dtype].magnitude)
    if scheme.rows > 1:
        magnitudes = magnitudes.max(axis=0, keepdims=True)
    starts = np.arange(0, bits.shape[1], scheme.columns or bits.shape[1])
    found: Bits = np.maximum.reduceat(magnitudes, starts, axis=1)
    return found


def _scales(peaks: Bits, dtype: str, limit: float) -> tuple[Values, Bytes]:
    """The scales of cells with the magnitudes ``peaks``: as float32, and as they are stored."""
    exact = _float32(peaks, dtype) / np.float32(limit)
    scales = _float32(elements(_stored(exact, dtype), dtype), dtype).copy()
    scales[scales == 0] = _FLOATS[dtype].epsilon
    return scales, _stored(scales, dtype)


def _float32(bits: Bits, dtype: str) -> Values:
    return cast(np.ascontiguousarray(bits).view(np.uint8), dtype, "F32").view("<f4")


def _stored(values: Values, dtype: str) -> Bytes:
    return cast(values.view(np.uint8), "F32", dtype)


def _aligned(values: Values, scales: Values, scheme: Scheme) -> tuple[Values, Values]:
    """``values`` [rows, K] and the scales that divide them, in shapes that broadcast."""
    if scheme.rows > 1 and scheme.columns is not None:  # K may end within a block
        return values, np.repeat(scales, scheme.columns, axis=1)[:, : values.shape[1]]
    return values.reshape(len(values), scales.shape[1], -1), scales[:, :, None]


def _indices(quotients: Values, dtype: str) -> NDArray[np.intp]:
    """Where ``_table`` has the quotients, which are overwritten: their 16 bits, rounded to ``dtype``."""
    if dtype == "F16":
        return quotients.astype("<f2").view("<u2").astype(np.intp)
    bits = quotients.view("<u4")
    if dtype == "F32":
        odd = (bits & np.uint32(0xFFFF)) != 0
        bits >>= np.uint32(16)
        bits |= odd
    else:
        # Half of the dropped range, minus one where the kept part is even: adding it rounds ties to even.
        bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
        bits >>= np.uint32(16)
    return bits.astype(np.intp)


@cache
def _table(dtype: str, kind: str) -> NDArray[np.uint32]:
    """What each of 2^16 quotients becomes: the value as float32, whose low byte is zero, with the number stored there.

    Quotients are float16 for ``F16``, else bfloat16. NaN does not occur.
    """
    patterns = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    quotients = np.nan_to_num(cast(patterns, "F16" if dtype == "F16" else "BF16", "F32").view("<f4")) + np.float32(0)
    numbers = _e4m3(quotients) if kind == "float" else (np.rint(np.clip(quotients, -8, 7)) + 8).astype(np.uint8)
    values = cast(numbers, "F8_E4M3", "F32").view("<f4") if kind == "float" else numbers.astype("<f4") - np.float32(8)
    found: NDArray[np.uint32] = values.view("<u4") | numbers
    return found


def _e4m3(values: Values) -> Bytes:
    """The nearest float8_e4m3fn of each value, of two the even one; beyond 448 it is 448."""
    known = cast(np.arange(127, dtype=np.uint8), "F8_E4M3", "F32").view("<f4").astype(np.float64)
    sizes = np.minimum(np.abs(values.astype(np.float64)), known[-1])
    above = np.searchsorted(known, sizes)
    below = np.maximum(above - 1, 0)
    middle = (known[above] + known[below]) / 2
    even = np.where(above % 2 == 0, above, below)
    nearest = np.where(sizes == middle, even, np.where(sizes > middle, above, below))
    found: Bytes = (nearest + 128 * np.signbit(values)).astype(np.uint8)
    return found


def _in_pairs(numbers: Bytes) -> Bytes:
    """Four bits each [rows, K] as bytes [rows, K / 2], the first of two in the low half: so that number i of eight is
    at bit 4 i of a little-endian int32."""
    pairs = numbers.view("<u2")
    found: Bytes = (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
    return found


def _loss(values: Values, rounded: Values) -> Loss:
    rounded -= values.reshape(rounded.shape)
    return Loss(_square_sum(rounded), _square_sum(values), float(max(rounded.max(), -rounded.min())))


def _square_sum(values: Values) -> float:
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        total = float(np.einsum("i,i->", flat, flat))
    if isfinite(total) and total > 1e-20:
        return total
    return float(np.square(flat, dtype=np.float64).sum())  # float32 has no room for such squares
