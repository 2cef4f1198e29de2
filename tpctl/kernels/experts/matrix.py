"""One linear of all experts that a rank has: what each form of it, numbers or codes, gives to the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpctl.kernels.experts.tile_config import TileConfig, pick_block_m


@dataclass(frozen=True)
class PairsLaunch:
    """What a launch over pairs (token, slot) has beside x, weights and output.

    Attributes:
        grid: tiles of output features, and of pairs.
        where: ids of the experts, the order of the pairs, the tiles, and what each pair counts.
        bias: [E, outputs].
        rows: tokens.
        first, count: the experts here.
        block_k: inputs of a tile.
        flags: options that all forms share.
    """

    grid: tuple[int, int]
    where: tuple[Tensor, ...]
    bias: Tensor | None
    rows: int
    first: int
    count: int
    block_k: int
    flags: dict[str, Any]


class ExpertMatrix(ABC):
    """[E, outputs, inputs]: a matrix of every expert here."""

    def pairs_of_tile(self, pairs: int, experts: int) -> int:
        """How many a tile should have, of so many pairs of all experts, whichever rank these are on."""
        return pick_block_m(pairs, experts)

    @property
    @abstractmethod
    def count(self) -> int:
        """E."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Rows of each expert's matrix."""

    @abstractmethod
    def numbers(self, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's, [outputs, inputs]."""

    @abstractmethod
    def tile(self, block_m: int, *, gated: bool, itemsize: int, limit: int) -> TileConfig:
        """The tile for so many pairs, as ``pick_tile`` has it."""

    @abstractmethod
    def grouped_pairs(self, x: Tensor, out: Tensor, launch: PairsLaunch) -> None:
        """The linear of every pair's expert, of x [T, inputs] or [T * K, inputs], into ``out`` [T * K, width]."""
