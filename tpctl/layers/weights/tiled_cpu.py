"""Weights in bfloat16 or float16 on processors that do not multiply these: made float32 a tile at a time.

Such a processor (x86 before AVX512_BF16 and AMX) multiplies bfloat16 two to ten times slower than float32. A tile of
the weight that is made float32 stays in a core's cache while it is multiplied, so that many rows take about as long as
a float32 model takes, and memory stays that of the stored form. Sums are in float32 and rounded once, as the slow way
has them. What was measured: docs/log/2026-11-30-cpu-dtypes.md.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.dense import DenseWeight

TILE = 1 << 19
"""Numbers of a tile: 2 MiB in float32, which stay in a core's cache while they are made and multiplied."""

FEW = 4
"""Rows up to which the weight is rather read once as it is: making a tile takes longer than multiplying it."""

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


class TiledWeight(DenseWeight):
    """W [out, in] in 16 bits, which few rows read as it is, and many in float32."""

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        if x.numel() <= FEW * x.shape[-1]:
            return F.linear(x, self.weight, bias)
        wide, found = x.float(), x.new_empty(*x.shape[:-1], len(self.weight))
        height = max(1, TILE // self.weight.shape[1])
        for start in range(0, len(self.weight), height):
            rows = slice(start, start + height)
            own = None if bias is None else bias[rows].float()
            found[..., rows] = F.linear(wide, self.weight[rows].float(), own)
        return found
