"""Where the kernels run that are tested: on a GPU, or in Triton's interpreter on the processor."""

from __future__ import annotations

import os

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
DTYPE = torch.float32 if INTERPRET else torch.bfloat16
"""The usual one; Triton's interpreter multiplies bfloat16 tiles as integers."""
DTYPES = [torch.float32] if INTERPRET else [torch.bfloat16, torch.float32]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over that of what is wanted, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
