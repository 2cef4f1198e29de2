"""Casts between the float dtypes of checkpoints on raw bytes, bit for bit as torch does them.

Rounding is to nearest, ties to even (from F64 by way of F32); a value too large becomes infinity
(``check_range`` finds those); NaN stays NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tpctl.errors import OverflowedError
from tpctl.partition.dtypes import TORCH_NAMES

Bytes = NDArray[np.uint8]

LARGEST = {"F16": 65504.0, "BF16": float.fromhex("0x1.fep127"), "F32": float.fromhex("0x1.fffffep127")}
"""The largest finite value of the dtypes that are cast to."""

_NARROWING = frozenset(
    {("F64", "F32"), ("F64", "BF16"), ("F64", "F16"), ("F32", "BF16"), ("F32", "F16"), ("BF16", "F16")}
)
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
_ADVICE = {"F16": "use --dtype bfloat16 or float32", "BF16": "use --dtype float32", "F32": "keep the dtype (auto)"}


def cast(data: Bytes, source: str, target: str) -> Bytes:
    """Cast the little-endian elements in ``data`` from dtype ``source`` to ``target`` (``F32``, ``F16``, ``BF16``).

    Args:
        data: a C-contiguous array of bytes, of any shape; its last axis holds whole elements.

    Returns:
        A new array of bytes with the same leading axes.
    """
    if source == target:
        return data
    wide = _to_float32(data, source)
    if target == "F32":
        return wide.view(np.uint8)
    if target == "BF16":
        return _to_bfloat16(wide).view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return wide.astype("<f2").view(np.uint8)


def check_range(data: Bytes, out: Bytes, source: str, target: str, name: str) -> None:
    """Check that ``cast`` made no finite element of ``data`` infinite in ``out``; what was infinite or NaN may stay so.

    Raises:
        OverflowedError: it did; the message calls the tensor ``name``.
    """
    if (source, target) not in _NARROWING:
        return
    bits, magnitude = (out.view("<u4"), 0x7FFFFFFF) if target == "F32" else (out.view("<u2"), 0x7FFF)
    infinite = (bits & magnitude) == _INFINITY[target]
    if not infinite.any():
        return
    values = data.view("<f8") if source == "F64" else _to_float32(data, source)
    lost = values[infinite & np.isfinite(values)]
    if lost.size:
        raise OverflowedError(
            f"{name} holds {float(lost[np.argmax(np.abs(lost))]):g}, beyond the range of {TORCH_NAMES[target]} "
            f"(at most {LARGEST[target]:g}); {_ADVICE[target]}, or `tpctl shard --allow-overflow` to make such values "
            "infinite"
        )


def _to_float32(data: Bytes, source: str) -> NDArray[np.float32]:
    if source == "BF16":
        return (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    if source == "F16":
        return data.view("<f2").astype("<f4")
    if source == "F8_E5M2":  # the upper half of a F16
        return (data.astype("<u2") << np.uint16(8)).view("<f2").astype("<f4")
    if source == "F8_E4M3":
        return _E4M3[data]
    with np.errstate(over="ignore", invalid="ignore"):
        return data.view("<f4") if source == "F32" else data.view("<f8").astype("<f4")


def _e4m3() -> NDArray[np.float32]:
    """The values of float8_e4m3fn (arXiv 2209.05433), which has no infinity: four bits of exponent, three behind it."""
    bits = np.arange(128)
    exponent, fraction = bits >> 3, bits & 7
    values = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype("<f4")


_E4M3 = _e4m3()


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view("<u4")
    # Half of the dropped range, minus one where the kept part is even: adding it rounds ties to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's mantissa over to infinity; torch writes 0x7FC0 for a NaN.
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2")
