"""Experts' matrices of codes with many pairs each: numbers of some experts at a time, which tiles of numbers multiply.

A tile of codes makes its numbers again for every tile of pairs, in front of the tensor cores, and is bound by that from
some tens of pairs an expert on. Made once, and read back, they cost the memory of four bytes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpctl.kernels.common.codes import Codes
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.grouped_kernels import grouped_linear_kernel
from tpctl.kernels.experts.matrix import ExpertMatrix, PairsLaunch
from tpctl.kernels.experts.tile_config import TileConfig, pick_tile
from tpctl.kernels.linear.codes_gemm import decode_into

_LEAST_PAIRS = 224
"""Of an expert, on average, where decoding pays: measured on an H200, of gpt-oss-20b."""
_LEAST_ROWS = 17
"""Fewer have no list of tiles (`grouped`)."""
_AT_ONCE = 1 << 26
"""Most numbers that are made at once, 128 MiB, but those of one expert at least."""


def decoding_pays(rows: int, pairs: int, experts: int, dtype: torch.dtype) -> bool:
    """Whether so many rows, and pairs of so many experts, are multiplied by numbers that are made before. In float32,
    where a result must not depend on the batch, they never are."""
    return dtype != torch.float32 and rows >= _LEAST_ROWS and pairs >= _LEAST_PAIRS * experts


@dataclass(frozen=True)
class DecodedMatrix(ExpertMatrix):
    """``coded``, for launches whose tiles `placing` has listed."""

    coded: CodedMatrix

    @property
    def count(self) -> int:
        return self.coded.count

    @property
    def outputs(self) -> int:
        return self.coded.outputs

    def numbers(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.coded.numbers(expert, dtype)

    def tile(self, block_m: int, *, gated: bool, itemsize: int, limit: int) -> TileConfig:
        return pick_tile(block_m, gated=gated, itemsize=itemsize, limit=limit)

    def grouped_pairs(self, x: Tensor, out: Tensor, launch: PairsLaunch) -> None:
        codes = self.coded.codes
        step = max(1, _AT_ONCE // (codes.outputs * codes.columns))
        for start in range(0, self.count, step):
            numbers = decode_experts(codes, start, min(start + step, self.count), x.dtype)
            grouped_linear_kernel[launch.grid](
                x,
                *launch.where,
                numbers,
                x if launch.bias is None else launch.bias[start:],
                out,
                launch.rows,
                x.stride(0),
                start,
                len(numbers),
                INPUTS=codes.columns,
                OUTPUTS=codes.outputs,
                PART=True,
                BLOCK_K=launch.block_k,
                **launch.flags,
            )


def decode_experts(codes: Codes, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The numbers of experts start to stop, [stop - start, outputs, K]. codes: [E, outputs, K]."""
    shape = (stop - start, codes.outputs, codes.columns)
    numbers = torch.empty(shape, dtype=dtype, device=codes.values.device)
    own = ("values", "scales", "zeros", "groups", "factors")
    held = {name: one[start:] for name in own if (one := getattr(codes, name)) is not None}
    decode_into(numbers, replace(codes, **held), 0, codes.outputs, matrices=len(numbers))
    return numbers
