"""The element types that a safetensors file may hold (https://github.com/huggingface/safetensors), and casts."""

from __future__ import annotations

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype that a header may name, in the reference's order, narrow ones first."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})
"""Dtypes that can be cast from. All others are integers, pairs, or parts of numbers whose scales stand elsewhere."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's dtype names that a model can be run in, and their names in safetensors headers."""

TORCH_NAMES = {stored: name for name, stored in DTYPES.items()}

CASTS = frozenset(TORCH_NAMES)
"""Dtypes that float tensors can be cast to."""

MOST_BYTES = 2**63 - 1
"""No tensor and no file is larger."""

MOST_AXES = 64
"""No tensor has more axes, in any library."""


def dtype_after_cast(dtype: str, target: str | None) -> str:
    """The dtype of a tensor of ``dtype`` where floats are cast to ``target``; ``None`` keeps them."""
    return target if target is not None and dtype in FLOATS else dtype
