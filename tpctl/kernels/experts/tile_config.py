"""How many pairs (token, slot), output features and inputs a tile of grouped GEMMs has."""

from __future__ import annotations

from typing import NamedTuple

from tpctl.kernels.common.launch import next_power_of_2


class TileConfig(NamedTuple):
    """Pairs, output features and inputs of a tile, launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


def pick_block_m(pairs: int, experts: int) -> int:
    """Pairs in a tile: half as many again as an expert has on average, so that most experts' are one tile; 16 to 128.

    experts: all of the model, on whichever rank. Measured on an H200: for 16 on average tiles of 32 pairs took 7% less.
    """
    return min(128, max(16, next_power_of_2(-(-3 * pairs // (2 * experts)))))


def pick_tile(
    block_m: int, *, gated: bool, itemsize: int, limit: int, codes: bool = False, packed: bool = False
) -> TileConfig:
    """A tile of so many pairs; ``itemsize`` bytes a number of x, ``limit`` bytes of shared memory.

    Few pairs only stream weights: many bytes under way. Many multiply: large tiles, as far as registers hold them,
    which those of numbers made of ``codes`` take too. With two warps the tensor cores take those from registers in any
    order, and the copies of codes are 16 bytes wide. Of ``packed`` ones half as many inputs took 8% less.
    """
    if itemsize == 4:
        config = TileConfig(block_m, 32, 32, 4, 2)
    elif block_m <= 32:
        config = TileConfig(block_m, 64, 128, 2 if codes else 4, 3)
        if block_m == 32 and gated and not codes:
            config = TileConfig(32, 64, 64, 4, 4)
        elif block_m == 32 and packed:
            config = TileConfig(32, 64, 64, 2, 4)
    elif codes:
        config = TileConfig(block_m, 64, 128, 4 if block_m == 64 else 8, 3)
    elif block_m == 64:
        config = TileConfig(64, 64 if gated else 128, 64, 4, 4)
    else:
        config = TileConfig(128, 128, 64, 8, 3 if gated else 4)
    while _bytes(config, gated, itemsize) > limit and config.num_stages > 2:
        config = config._replace(num_stages=config.num_stages - 1)
    while _bytes(config, gated, itemsize) > limit and config.block_k > 32:
        config = config._replace(block_k=config.block_k // 2)
    return config


def _bytes(config: TileConfig, gated: bool, itemsize: int) -> int:
    """Shared memory of a tile's operands while they are under way."""
    rows = config.block_m + config.block_n * (2 if gated else 1)
    return config.num_stages * rows * config.block_k * itemsize
