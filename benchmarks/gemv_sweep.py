"""Finds how a linear of one row, or of two to four, is best cut, on one GPU: the fastest configurations beside the one
that is picked.

    python benchmarks/gemv_sweep.py 5120x2048 2048x4096 g14336x4096 [--rows 1 2 4] [--best 3]

A shape is outputs x inputs; g: gate and up of so many outputs each. What stands before or after the linear in a decode
step is fused in: a norm, or the residual where it has fewer outputs than inputs. Figures are medians of replays of a
CUDA graph whose launches rotate through more memory than the L2 cache holds. The kernels are compiled by all
processors beforehand, into Triton's cache on the disk.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from kernel_timing import BF16, DEVICE, graph_us, random_weights, row

from tpctl.kernels.linear.gemv import GemvConfig, GemvScratch, pick, pick_tensor_cores, small_linear

Shape = tuple[int, int, bool]
"""Outputs, inputs, gated."""


def parse(text: str) -> Shape:
    outputs, _, inputs = text.removeprefix("g").partition("x")
    return int(outputs), int(inputs), text.startswith("g")


def configs(shape: Shape, rows: int) -> Iterator[GemvConfig]:
    """Of one row those whose tile holds 4 to 32 KiB of weights, 64 to 128 bytes a thread; of several what is picked for
    one, with a smaller tile or more warps for more sums, and tensor cores."""
    outputs, inputs, gated = shape
    if rows > 1:
        one = pick(1, outputs, inputs, gated=gated)
        assert one is not None
        for block_n, block_k, warps in itertools.product(
            {one.block_n, one.block_n // 2, one.block_n // 4} - {0},
            {one.block_k, one.block_k // 2},
            {one.num_warps, 2 * one.num_warps} - {16},
        ):
            sums = block_n * block_k * rows * (2 if gated else 1)
            if 48 <= sums // (32 * warps) <= 128:
                yield one._replace(block_n=block_n, block_k=block_k, num_warps=warps, early=False)
        yield pick_tensor_cores(rows, outputs, inputs, gated=gated)
        return
    for block_n, block_k, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8)):
        values = block_n * block_k * (2 if gated else 1)
        if block_k < 2 * inputs and 32 <= values // (32 * warps) <= 64 and 2048 <= values <= 16384:
            for prefetch in (0, 1) if inputs > block_k else (0,):
                yield GemvConfig(block_n, block_k, num_warps=warps, prefetch=prefetch)


def one(shape: Shape, rows: int, weights: list[torch.Tensor], config: GemvConfig) -> list[Any]:
    outputs, inputs, gated = shape
    scratch = GemvScratch.allocate(DEVICE)
    x = torch.randn(rows, inputs, device=DEVICE, dtype=BF16)
    out = torch.empty(rows, outputs, device=DEVICE, dtype=BF16)
    options: dict[str, Any] = {"residual_TO": out} if outputs <= inputs and not gated else {"norm": (x[0], 1e-6)}
    if gated:
        options["activation"] = "silu"
    return [
        partial(small_linear, x, weight, scratch, out=out, config=config, pdl=True, **options) for weight in weights
    ]


def compile_it(job: tuple[Shape, int, GemvConfig]) -> None:
    """In a process of its own: what it leaves is on the disk."""
    shape, rows, config = job
    weights = [torch.empty(shape[0] * (2 if shape[2] else 1), shape[1], device=DEVICE, dtype=BF16)]
    one(shape, rows, weights, config)[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", type=parse)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--best", type=int, default=3)
    args = parser.parse_args()
    jobs = [(shape, rows, config) for shape in args.shapes for rows in args.rows for config in configs(shape, rows)]
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_it, jobs, chunksize=8))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(jobs)} configurations")
    row("linear", "rows", "us", "TB/s", "config")
    for shape, rows in itertools.product(args.shapes, args.rows):
        outputs, inputs, gated = shape
        size = outputs * (2 if gated else 1) * inputs * 2
        weights = random_weights(max(2, min(24, int(2.5e8 / size))), size // inputs // 2, inputs)
        weights *= max(1, 20 // len(weights))
        picked = pick(rows, outputs, inputs, gated=gated)
        assert picked is not None
        times = {config: graph_us(one(shape, rows, weights, config), 3) for config in {picked, *configs(shape, rows)}}
        for config in [picked, *sorted(times, key=times.__getitem__)[: args.best]]:
            name = f"{'g' * gated}{outputs}x{inputs}{' picked' * (config == picked)}"
            row(name, rows, f"{times[config]:.2f}", f"{size / times[config] / 1e6:.2f}", str(tuple(config)))


if __name__ == "__main__":
    main()
