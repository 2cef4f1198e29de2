"""The dtypes that a model can be run in."""

from __future__ import annotations

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's names for them, and theirs in safetensors headers."""
