"""Weights in bfloat16 or float16 on processors that do not multiply these: made float32 a tile at a time.

Such a processor (x86 before AVX512_BF16 and AMX) multiplies bfloat16 two to ten times slower than float32. A tile of
the weight that is made float32 stays in a core's cache while it is multiplied, so that many rows take about as long as
a float32 model takes, and memory stays that of the stored form. Sums are in float32 and rounded once, as the slow way
has them. What was measured: docs/log/2026-11-30-cpu-dtypes.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.layers.instructions import product_dtype
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.dense import DenseWeight

TILE = 1 << 19
"""Numbers of a tile: 2 MiB in float32, which stay in a core's cache while they are made and multiplied."""

FEW = 4
"""Rows up to which the weight is rather read once as it is: making a tile takes longer than multiplying it."""

TURNED = 256
"""Rows up to which threads are rather given rows of W than of x, of which they would have too few."""

LARGE_TILE = 1 << 22
"""Of more rows, which leave no room in a cache for a tile: fewer products, for 16 MiB while one is multiplied."""


def linear_in_tiles(
    x: Tensor, bias: Tensor | None, outputs: int, tile: Callable[[int, int, torch.dtype], Tensor]
) -> Tensor:
    """x W^T + bias [.., outputs], in the dtype of ``x`` [.., in].

    Args:
        tile: makes rows of W, from one to another, in the dtype that it is told: that of the products.
    """
    dtype = product_dtype(x.dtype, x.device)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    height = max(1, (TILE if len(flat) <= TURNED else LARGE_TILE) // x.shape[-1])
    tiles = [(start, min(start + height, outputs)) for start in range(0, outputs, height)]
    alone = flat.device.type != "cpu" or torch.get_num_threads() == 1
    if dtype is torch.float32 and len(flat) <= TURNED and not alone:
        turned = flat.new_empty(outputs, len(flat))
        for start, stop in tiles:
            torch.mm(tile(start, stop, dtype), flat.t(), out=turned[start:stop])
        if bias is not None:
            turned.add_(bias.unsqueeze(1))
        product = turned.t().to(x.dtype, memory_format=torch.contiguous_format)
    else:
        product = x.new_empty(len(flat), outputs)
        for start, stop in tiles:
            own = None if bias is None else bias[start:stop].to(dtype)
            product[:, start:stop] = F.linear(flat, tile(start, stop, dtype), own)
    return product.view(*x.shape[:-1], outputs)


class TiledWeight(DenseWeight):
    """W [out, in] in 16 bits, which few rows read as it is, and many in float32."""

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        if x.numel() <= FEW * x.shape[-1]:
            return F.linear(x, self.weight, bias)
        return linear_in_tiles(x, bias, len(self.weight), self._tile)

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)
