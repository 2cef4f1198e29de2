"""Casts between the float dtypes of checkpoints on raw bytes, bit for bit as torch does them.

Rounding is to nearest, ties to even (from F64 by way of F32); a value too large becomes infinity; NaN stays NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


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


def _to_float32(data: Bytes, source: str) -> NDArray[np.float32]:
    if source == "BF16":
        return (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    if source == "F16":
        return data.view("<f2").astype("<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        return data.view("<f4") if source == "F32" else data.view("<f8").astype("<f4")


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view("<u4")
    # Half of the dropped range, minus one where the kept part is even: adding it rounds ties to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's mantissa over to infinity; torch writes 0x7FC0 for a NaN.
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2")
