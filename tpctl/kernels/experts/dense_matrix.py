"""Experts' matrices of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.kernels.experts.grouped_kernels import grouped_linear_kernel
from tpctl.kernels.experts.matrix import ExpertMatrix, PairsLaunch
from tpctl.kernels.experts.tile_config import TileConfig, pick_tile


@dataclass(frozen=True)
class DenseMatrix(ExpertMatrix):
    """``values`` [E, outputs, inputs], contiguous, in the dtype of what it multiplies."""

    values: Tensor

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def outputs(self) -> int:
        return self.values.shape[1]

    def numbers(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.values[expert].to(dtype)

    def tile(self, block_m: int, *, gated: bool, itemsize: int, limit: int) -> TileConfig:
        return pick_tile(block_m, gated=gated, itemsize=itemsize, limit=limit)

    def grouped_pairs(self, x: Tensor, out: Tensor, launch: PairsLaunch) -> None:
        grouped_linear_kernel[launch.grid](
            x,
            *launch.where,
            self.values,
            x if launch.bias is None else launch.bias,
            out,
            launch.rows,
            x.stride(0),
            launch.first,
            launch.count,
            INPUTS=self.values.shape[2],
            OUTPUTS=self.outputs,
            PART=False,
            BLOCK_K=launch.block_k,
            **launch.flags,
        )
