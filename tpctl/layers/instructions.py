"""What this processor has instructions for: without them products in 16 bits take five times as long as in float32."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

_NEEDS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2"), torch.float16: ("avx512_fp16", "amx_fp16")}
"""What of a processor's flags says that it does; torch.cpu.get_capabilities has them."""

_LIMIT = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of oneDNN's own limit that leave its products of 16-bit floats without instructions."""


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of ``dtype``; true where that cannot be found out."""
    if dtype not in _NEEDS:
        return True
    if any(os.environ.get(name, "").upper() in _WITHOUT for name in _LIMIT):
        return False
    try:
        found = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        return True
    known = found.get("architecture") in ("x86_64", "amd64")
    return not known or any(found.get(name) for name in _NEEDS[dtype])


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm`` in the dtype of ``left``, as ``product_dtype`` has it best."""
    dtype = product_dtype(left.dtype, left.device)
    return torch.bmm(left.to(dtype), right.to(dtype)).to(left.dtype)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which numbers of ``dtype`` are best multiplied there."""
    return torch.float32 if device.type == "cpu" and not multiplies(dtype) else dtype
