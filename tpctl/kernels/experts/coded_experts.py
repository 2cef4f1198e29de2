"""Experts both of whose linears are codes: many pairs in 8-bit numbers, or by numbers decoded before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpctl.kernels.common.launch import capability, shared_memory
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.decoded_matrix import DecodedMatrix, decoding_pays
from tpctl.kernels.experts.grouped_scaled import pick_scaled, scaled_pairs
from tpctl.kernels.experts.matrices import UNLISTED_ROWS, ExpertMatrices
from tpctl.kernels.experts.placing import place
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.experts.tile_config import pick_block_m


@dataclass(frozen=True)
class CodedExperts(ExpertMatrices[CodedMatrix]):
    """Of which many pairs are multiplied in 8-bit numbers (`grouped_scaled`), if their format rounds inputs, else very
    many by numbers that are made before (`decoded_matrix`)."""

    def grouped_pairs(self, routed: Routed, total: int, *, pdl: bool = False) -> torch.Tensor:
        x, pairs = routed.x, routed.ids.numel()
        configs = None
        if x.dtype != torch.float32 and len(x) > UNLISTED_ROWS:
            block_m = pick_block_m(pairs, total)
            configs = pick_scaled(pairs, self, total, block_m, capability(x.device), shared_memory(x.device))
        if configs is None:
            if decoding_pays(len(x), pairs, total, x.dtype):
                return self.decoded().grouped_pairs(routed, total)
            return super().grouped_pairs(routed, total, pdl=pdl)
        placed = place(routed.ids, self.count, configs[0].block_m, first=self.first, pdl=pdl)
        return scaled_pairs(routed, self, placed, configs, pdl=pdl)

    def decoded(self) -> ExpertMatrices[DecodedMatrix]:
        """The same experts, for listed tiles."""
        parts = {**vars(self), "gate_up": DecodedMatrix(self.gate_up), "down": DecodedMatrix(self.down)}
        return ExpertMatrices(**parts)
