"""Experts' matrices of codes with many pairs each: numbers of some experts at a time, which tiles of numbers multiply.

A tile of codes makes its numbers again for every tile of pairs, in front of the tensor cores, and is bound by that from
some tens of pairs an expert on. Made once, and read back, they cost the memory of four bytes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tpctl.kernels.common.codes import Codes
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.grouped_kernels import grouped_linear_kernel
from tpctl.kernels.experts.matrix import ExpertMatrix, PairsLaunch
from tpctl.kernels.experts.tile_config import TileConfig, pick_tile
from tpctl.kernels.linear.codes_gemm_kernels import decode_kernel
from tpctl.kernels.linear.codes_linear import as_bytes, form_of

_LEAST_PAIRS = 224
"""Of an expert, on average, where decoding pays: measured on an H200, of gpt-oss-20b."""
_LEAST_ROWS = 17
"""Fewer have no list of tiles (`grouped`)."""
_AT_ONCE = 1 << 26
"""Most numbers that are made at once, 128 MiB, but those of one expert at least."""
_BLOCK_N = 32


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
    form, tile, parts = form_of(codes, 64, fast=False)
    experts, outputs = stop - start, codes.outputs
    numbers = torch.empty((experts, outputs, codes.columns), dtype=dtype, device=codes.values.device)
    decode_kernel[(triton.cdiv(outputs, _BLOCK_N), triton.cdiv(form.row_bytes, tile), experts)](
        as_bytes(codes.values[start:], numbers),
        as_bytes(codes.scales[start:], numbers),
        as_bytes(None if codes.zeros is None else codes.zeros[start:], codes.values.view(torch.uint8)),
        as_bytes(codes.rows, numbers),
        as_bytes(None if codes.groups is None else codes.groups[start:], numbers),
        as_bytes(None if codes.factors is None else codes.factors[start:], numbers),
        numbers,
        0,
        outputs,
        outputs,
        codes.scales.shape[1],
        FORM=form,
        BLOCK_N=_BLOCK_N,
        BYTES=tile,
        GROUPS=parts,
        PDL=False,
        num_warps=4,
    )
    return numbers
