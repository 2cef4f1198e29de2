"""The fastest tiles for experts (``expert_bench.py sweep``)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from expert_cases import (
    GPT_OSS,
    QWEN,
    SHARED_MEMORY,
    Shape,
    alone,
    cases,
    random_layers,
)
from kernel_timing import BF16, DEVICE, graph_us, row

from tpctl.kernels.common.launch import num_multiprocessors
from tpctl.kernels.experts.matrices import UNLISTED_ROWS, ExpertMatrices
from tpctl.kernels.experts.one_row import RowConfig, pick_row
from tpctl.kernels.experts.placing import place
from tpctl.kernels.experts.tile_config import TileConfig

Sweep = tuple[str, Callable[..., float], list[Any]]
"""A name, what times a configuration, and those to try."""


def best(sweep: Sweep, count: int = 5) -> list[Any]:
    """The fastest configurations, first; those that do not compile are left out."""
    name, time, configs = sweep
    found: list[tuple[float, Any]] = []
    for config in configs:
        try:
            found.append((time(config), config))
        except Exception as error:  # more shared memory or registers than there are
            print(f"{name} {config}: {type(error).__name__}", file=sys.stderr)
    found.sort(key=lambda one: one[0])
    for us, config in found[:count]:
        row(name, f"{us:.1f}", tuple(config))
    print(f"{name}: all {[(round(us, 1), tuple(config)) for us, config in found]}", file=sys.stderr)
    return [config for _, config in found]


def row_sweeps(shape: Shape, layers: list[ExpertMatrices[Any]]) -> Iterator[Sweep]:
    """Tiles of gate_up beside the chosen ones of down, and the other way round."""
    made = alone(shape, layers)
    start = pick_row(shape.hidden, shape.width, itemsize=2, programs=num_multiprocessors(DEVICE), limit=SHARED_MEMORY)

    def time(config: RowConfig) -> float:
        return graph_us([partial(one.call, config=config, pdl=True) for one in made])

    sizes = [
        (n, k, stages, warps)
        for n, k, stages, warps in itertools.product((2, 4, 8, 16), (256, 512, 1024, 2048), (3, 4, 6, 10), (8, 16))
        if 32 << 10 <= (stages - 1) * n * k * 2 <= 100 << 10 and 4096 <= n * k <= 16384
    ]
    ups = [start._replace(up_n=n, up_k=k, up_stages=s, num_warps=w) for n, k, s, w in sizes]
    yield f"{shape.name} one row, gate_up", time, ups
    downs = [start._replace(down_n=n, down_k=k, down_stages=s, num_warps=w) for n, k, s, w in sizes]
    yield f"{shape.name} one row, down", time, downs


def tile_sweeps(shape: Shape, layers: list[ExpertMatrices[Any]], rows: int) -> Iterator[Sweep]:
    made = cases(layers, shape, rows)[:6]
    sizes = (16,) if rows <= UNLISTED_ROWS else (16, 32, 64) if rows <= 512 else (64, 128, 256)
    h = torch.randn(rows * shape.per_token, shape.width, device=DEVICE, dtype=BF16)
    for block_m in sizes:
        placed: list[Any] = [place(r.ids, shape.count, block_m) if rows > UNLISTED_ROWS else None for r, _ in made]

        def up(config: TileConfig, placed: Any = placed) -> float:
            return graph_us([partial(e.gate_up_pairs, r, p, config) for (r, e), p in zip(made, placed, strict=True)])

        def down(config: TileConfig, placed: Any = placed) -> float:
            return graph_us([partial(e.down_pairs, h, r, p, config) for (r, e), p in zip(made, placed, strict=True)])

        widths = (32, 64, 128) if block_m <= 32 else (64, 128)
        for gated, time in ((True, up), (False, down)):
            configs = [
                TileConfig(block_m, *one)
                for one in itertools.product(widths, (64, 128, 256), (2, 4, 8), (3, 4))
                if one[3] * (block_m + one[0] * (1 + gated)) * one[1] * 2 <= SHARED_MEMORY
                and 2048 <= block_m * one[0] * (1 + gated) // one[2] * 4 <= 16384
            ]
            if block_m > 32:
                configs = [one for one in configs if one.num_warps > 2 and one.block_k <= 128]
            yield f"{shape.name} {rows} rows {'gate_up' if gated else 'down'} of {block_m}", time, configs


def bench_sweep() -> None:
    row("best configurations", "us")
    for shape in (QWEN, GPT_OSS):
        layers = random_layers(shape)
        for sweep in row_sweeps(shape, layers):
            best(sweep)
        for rows in (8, 64, 512, 8192):
            for sweep in tile_sweeps(shape, layers, rows):
                best(sweep, 3)
