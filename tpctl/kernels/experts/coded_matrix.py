"""Experts' matrices of codes (`common.codes`), which become numbers of x's dtype in registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.kernels.common.codes import PACKED, Codes, decode
from tpctl.kernels.experts.grouped_codes_kernels import grouped_codes_kernel
from tpctl.kernels.experts.matrix import ExpertMatrix, PairsLaunch
from tpctl.kernels.experts.tile_config import TileConfig, pick_tile
from tpctl.kernels.linear.codes_linear import as_bytes, form_of, may_be_fast


@dataclass(frozen=True)
class CodedMatrix(ExpertMatrix):
    """``codes`` of [E, outputs, inputs]."""

    codes: Codes

    @property
    def count(self) -> int:
        return len(self.codes.values)

    @property
    def outputs(self) -> int:
        return self.codes.outputs

    def pairs_of_tile(self, pairs: int, experts: int) -> int:
        """Of packed codes, whose numbers are in registers of two warps in front of the tensor cores, 16 or 32: on an
        H200 32 took 12% less for 16 of an expert on average, 25% more for 14, and never more than 64."""
        if self.codes.kind not in PACKED:
            return super().pairs_of_tile(pairs, experts)
        return 16 if pairs < 15 * experts else 32

    def numbers(self, expert: int, dtype: torch.dtype) -> Tensor:
        return decode(self.codes.of_expert(expert)).to(dtype)

    def tile(self, block_m: int, *, gated: bool, itemsize: int, limit: int) -> TileConfig:
        return pick_tile(
            block_m, gated=gated, itemsize=itemsize, limit=limit, codes=True, packed=self.codes.kind in PACKED
        )

    def grouped_pairs(self, x: Tensor, out: Tensor, launch: PairsLaunch) -> None:
        codes = self.codes
        form, tile, groups = form_of(codes, most_bytes(codes, launch.block_k), fast=may_be_fast(x, x))
        in_twos = form.packed and form.fast
        grouped_codes_kernel[launch.grid](
            x.view(torch.int32) if in_twos else x,
            *launch.where,
            as_bytes(codes.values, x),
            as_bytes(codes.scales, x),
            as_bytes(codes.zeros, codes.values.view(torch.uint8)),
            *(as_bytes(one, x) for one in (codes.rows, codes.groups, codes.factors)),
            x if launch.bias is None else launch.bias,
            out,
            launch.rows,
            x.stride(0) // 2 if in_twos else x.stride(0),
            launch.first,
            launch.count,
            FORM=form,
            OUTPUTS=codes.outputs,
            SCALE_ROWS=codes.scales.shape[1],
            BYTES=tile,
            GROUPS=groups,
            **launch.flags,
        )


def most_bytes(codes: Codes, block_k: int) -> int:
    """Of a row in a tile of so many inputs. Tensor cores multiply by 16 at least, and of packed codes the even and the
    odd inputs are two products."""
    return max(16, block_k // 2) if codes.kind in PACKED else block_k
