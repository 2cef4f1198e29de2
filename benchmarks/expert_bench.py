"""Times tpctl's kernels for mixtures of experts on one GPU, beside their floors and plain torch.

    python benchmarks/expert_bench.py [route] [one] [rows] [codes] [step] [sweep]

Every figure is the median of several replays of a CUDA graph whose calls choose other experts of several layers, so
that weights come from memory. A floor is the larger of the bytes that must be read over the bandwidth that a large copy
reaches here, and the operations over 990 TFLOP/s. `error`: of the result, beside float32 by the same numbers. One row
counts norm, router and choice. Torch is a loop over the experts that were chosen, known beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from expert_cases import (
    GPT_OSS,
    QWEN,
    SHAPES,
    SHARED_MEMORY,
    Alone,
    Shape,
    alone,
    bandwidth,
    cases,
    error_of,
    floor_us,
    random_codes,
    random_layers,
    random_router,
    torch_loop,
)
from expert_sweep import bench_sweep
from kernel_timing import BF16, DEVICE, graph_us, row

from tpctl.arch.routing import Routing
from tpctl.kernels.common.codes import Kind
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.codes_row import codes_row
from tpctl.kernels.experts.grouped import grouped
from tpctl.kernels.experts.grouped_scaled import LEAST_PAIRS
from tpctl.kernels.experts.matrices import UNLISTED_ROWS, ExpertMatrices
from tpctl.kernels.experts.one_row import one_row
from tpctl.kernels.experts.placing import place
from tpctl.kernels.experts.routing import GATE_ROWS, GateScratch, Routed, gate, route
from tpctl.kernels.experts.tile_config import pick_block_m, pick_tile
from tpctl.kernels.linear.codes_gemm import is_scaled

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)


def bench_route() -> None:
    row("norm + router + choice", "rows", "us", "us, no pdl", "choice alone", "torch")
    scratch = GateScratch.allocate(DEVICE)
    for shape in (*SHAPES, Shape("DeepSeek-V3", 7168, 2048, 256, 8, Routing("sigmoid", True, 8, 4, 2.5, 1e-20))):
        routers = [random_router(shape) for _ in range(16)]
        norm = (torch.ones(shape.hidden, device=DEVICE, dtype=BF16), 1e-6)
        for rows in (1, 4, 16, 64, 512, 8192):
            x = torch.randn(rows, shape.hidden, device=DEVICE, dtype=BF16)
            logits = torch.randn(rows, shape.count, device=DEVICE)
            times = ["-", "-"]
            if rows <= GATE_ROWS:
                call = partial(gate, x, scratch=scratch, norm=norm)
                both = (graph_us([partial(call, router=r, pdl=pdl) for r in routers]) for pdl in (True, False))
                times = [f"{us:.1f}" for us in both]
            choice = graph_us([partial(route, logits, shape.routing, shape.per_token, pdl=True)] * 16)

            def plain(w: torch.Tensor, x: torch.Tensor = x, shape: Shape = shape) -> Any:
                return torch.mm(x, w.t(), out_dtype=torch.float32).softmax(-1).topk(shape.per_token)

            torch_us = graph_us([partial(plain, r.weight) for r in routers])
            row(shape.name, rows, *times, f"{choice:.1f}", f"{torch_us:.1f}")


def bench_one() -> None:
    row("one row", "us, pdl", "us, no pdl", "floor", "reached", "error", "torch loop")
    for shape in SHAPES:
        made = alone(shape, random_layers(shape))
        times = [graph_us([partial(one.call, pdl=pdl) for one in made]) for pdl in (True, False)]
        routed, experts = made[0].routed, made[0].experts
        floor = floor_us(shape, routed)
        row(shape.name, *(f"{us:.1f}" for us in times), f"{floor:.1f}", f"{floor / min(times):.0%}",
            error_of(made[0].call, routed, experts),
            f"{graph_us([torch_loop(one.routed, one.experts) for one in made]):.1f}")  # fmt: skip


def bench_rows() -> None:
    row("any number of rows", "rows", "tile", "place", "gate_up", "down", "all, pdl", "floor", "reached", "error",
        "torch loop")  # fmt: skip
    for shape in SHAPES:
        layers = random_layers(shape)
        for rows in ROWS:
            made = cases(layers, shape, rows)
            block_m = UNLISTED_ROWS
            placed: list[Any] = [None] * len(made)
            placing = "-"
            if rows > UNLISTED_ROWS:
                block_m = pick_block_m(rows * shape.per_token, shape.count)
                placing = f"{graph_us([partial(place, r.ids, shape.count, block_m) for r, _ in made]):.1f}"
                placed = [place(r.ids, shape.count, block_m) for r, _ in made]
            first, second = (
                pick_tile(block_m, gated=gated, itemsize=2, limit=SHARED_MEMORY) for gated in (True, False)
            )
            up = graph_us([partial(e.gate_up_pairs, r, p, first) for (r, e), p in zip(made, placed, strict=True)])
            h = torch.randn(rows * shape.per_token, shape.width, device=DEVICE, dtype=BF16)
            down = graph_us([partial(e.down_pairs, h, r, p, second) for (r, e), p in zip(made, placed, strict=True)])
            everything = graph_us([partial(grouped, r, e, pdl=rows <= 512) for r, e in made])
            floor = floor_us(shape, made[0][0])
            row(shape.name, rows, block_m, placing, f"{up:.1f}", f"{down:.1f}", f"{everything:.1f}", f"{floor:.1f}",
                f"{floor / everything:.0%}", error_of(partial(grouped, *made[0]), *made[0]),
                f"{graph_us([torch_loop(*one) for one in made[:3]]):.1f}")  # fmt: skip


CODES: list[tuple[str, Kind, int | None, bool, float]] = [
    ("e4m3 blocks of 128", "e4m3", 128, False, 8),
    ("e4m3 channels", "e4m3", None, False, 8),
    ("int8 channels", "int8", None, False, 8),
    ("uint4 groups of 128", "uint4", 128, False, 4.25),
    ("e2m1 groups of 32", "e2m1", 32, True, 4.25),
]


def bench_codes() -> None:
    row("codes", "rows", "us", "floor", "reached", "bf16 us", "error", "8-bit us", "error")
    for shape in (QWEN, GPT_OSS):
        plain = random_layers(shape)
        for name, kind, unit, exponents, bits in CODES:
            count, hidden, width = shape.count, shape.hidden, shape.width
            coded = [
                CodedExperts(
                    CodedMatrix(random_codes(kind, count, 2 * width, hidden, unit, exponents)),
                    CodedMatrix(random_codes(kind, count, hidden, width, unit, exponents)),
                    one.gate_up_bias,
                    one.down_bias,
                    shape.activation,
                    shape.interleaved,
                )
                for one in plain
            ]
            for rows in (1, 8, 64, 512, 1024, 8192):
                us, routed, call = timed(coded, shape, rows, by_row=True)
                dense, _, _ = timed(plain, shape, rows, by_row=True)
                floor = floor_us(shape, routed, bits)
                row(f"{shape.name} {name}", rows, f"{us:.1f}", f"{floor:.1f}", f"{floor / us:.0%}", f"{dense:.1f}",
                    error_of(call, routed, coded[0]), *in_8_bits(coded, shape, rows))  # fmt: skip


def in_8_bits(layers: list[CodedExperts], shape: Shape, rows: int) -> tuple[str, str]:
    """Microseconds and error where x is rounded to the weights' 8 bits, if so many rows would be."""
    rounding = []
    for one in layers:
        gate_up, down = replace(one.gate_up.codes, rounds=True), replace(one.down.codes, rounds=True)
        enough = rows * shape.per_token >= LEAST_PAIRS * shape.count
        if not (enough and is_scaled(gate_up, (9, 0)) and is_scaled(down, (9, 0))):
            return "", ""
        rounding.append(replace(one, gate_up=CodedMatrix(gate_up), down=CodedMatrix(down)))
    us, routed, call = timed(rounding, shape, rows, by_row=False)
    return f"{us:.1f}", error_of(call, routed, rounding[0])


def coded_row(one: Alone) -> torch.Tensor:
    return codes_row(gate(*one[:3], norm=one.norm, pdl=True), one.experts, pdl=True)


def timed(
    layers: Sequence[ExpertMatrices[Any]], shape: Shape, rows: int, *, by_row: bool
) -> tuple[float, Routed, Callable[[], torch.Tensor]]:
    """Microseconds, and what the first call was of. by_row: one row goes the way that it goes in `CudaExperts`, router
    included."""
    if rows == 1 and by_row:
        single = alone(shape, layers)
        if isinstance(layers[0], CodedExperts):
            us = graph_us([partial(coded_row, one) for one in single])
            return us, single[0].routed, partial(coded_row, single[0])
        return graph_us([partial(one.call, pdl=True) for one in single]), single[0].routed, single[0].call
    made = cases(layers, shape, rows)
    return graph_us([partial(grouped, r, e, pdl=rows <= 512) for r, e in made]), made[0][0], partial(grouped, *made[0])


def bench_step() -> None:
    """All mixtures of a step of Qwen3-30B-A3B, one after the other: norm, router, choice, experts, residual."""
    row("48 mixtures of Qwen3-30B-A3B", "rows", "ms", "ms, no pdl", "floor ms")
    shape, layers = QWEN, random_layers(QWEN)
    scratch = GateScratch.allocate(DEVICE)
    norm = (torch.ones(shape.hidden, device=DEVICE, dtype=BF16), 1e-6)
    routers = [random_router(shape) for _ in range(48)]
    for rows in (1, 2, 4, 8, 16):
        x = torch.randn(rows, shape.hidden, device=DEVICE, dtype=BF16)

        def step(pdl: bool, x: torch.Tensor = x) -> None:
            for i, router in enumerate(routers):
                if len(x) == 1:
                    one_row(x, router, scratch, layers[i % 2], norm=norm, residual_TH=x, out=x, pdl=pdl)
                else:
                    grouped(gate(x, router, scratch, norm=norm, pdl=pdl), layers[i % 2], residual_TH=x, out=x, pdl=pdl)

        times = [graph_us([partial(step, pdl)]) / 1e3 for pdl in (True, False)]
        x.normal_()
        floors = [floor_us(shape, gate(x, router, scratch, norm=norm)) for router in routers]
        row("", rows, *(f"{ms:.3f}" for ms in times), f"{sum(floors) / 1e3:.3f}")


SECTIONS = {
    "route": bench_route,
    "one": bench_one,
    "rows": bench_rows,
    "codes": bench_codes,
    "step": bench_step,
    "sweep": bench_sweep,
}


def main() -> None:
    """Run the sections named on the command line, or all but the sweep."""
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"{bandwidth() / 1e6:.2f} TB/s read")  # fmt: skip
    for name in sys.argv[1:] or [one for one in SECTIONS if one != "sweep"]:
        with torch.inference_mode():
            SECTIONS[name]()
        print()


if __name__ == "__main__":
    main()
