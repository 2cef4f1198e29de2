"""Times linears of quantised weights on one GPU, beside what memory allows and beside cuBLAS in bfloat16.

    PYTHONPATH=. python benchmarks/codes_bench.py [correct] [few] [layer] [many] [sweep]
        [--kinds gptq mxfp4] [--rows 1 16] [--shapes 4096x4096 g14336x4096]

correct compares every kernel with the numbers that the codes stand for; a speed counts only beside it. few: 1 to 16
rows, with norm, residual or gate fused as a decode step has them. layer: the shapes in turn, at one row. many: 17 rows
and more, each way that there is. sweep: configurations of ``codes_linear``, the best four beside the one that is
picked. A shape is outputs x inputs; g: gate and up of so many outputs each. Figures are medians of replays of a CUDA
graph whose launches rotate through more memory than the L2 cache holds. "of floor": the time that the stored bytes
take at the memory's datasheet rate, over the time taken. Without a section all but sweep are run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

try:
    import triton
except ImportError:
    raise SystemExit("this times Triton kernels: it needs the package triton and a CUDA GPU") from None

from kernel_timing import BF16, DEVICE, graph_us, row

from tpctl.kernels.common.codes import PACKED, Codes, Kind
from tpctl.kernels.common.launch import capability, is_hopper, num_multiprocessors, shared_memory
from tpctl.kernels.common.norm import rms_norm
from tpctl.kernels.linear.codes_gemm import (
    decode_rows,
    decoded_linear,
    gemm_config,
    pick_way,
    quantize_rows,
    scaled_gemm,
)
from tpctl.kernels.linear.codes_gemv import CodesGemvConfig, codes_gemv, pick_codes_gemv
from tpctl.kernels.linear.codes_linear import MOST_ROWS, CodesConfig, codes_linear, codes_linear_reference, pick_codes
from tpctl.kernels.linear.codes_ring import CodesRingConfig, codes_ring, pick_codes_ring
from tpctl.kernels.linear.gemv import GemvScratch

L2 = 250_000_000
"""Bytes of weights that a graph goes through: several times an L2 cache."""

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
"""Bytes a second, by datasheet."""


@dataclass(frozen=True)
class Format:
    """A checkpoint format: kind of codes, inputs and outputs that share a scale, dtype of scales."""

    kind: Kind
    unit: int = 0
    rows_unit: int = 1
    scales: torch.dtype = BF16
    zeros: bool = False
    factors: bool = False


FORMATS = {
    "fp8 block": Format("e4m3", 128, 128, torch.float32),
    "fp8 channel": Format("e4m3", scales=torch.float32),
    "int8 channel": Format("int8"),
    "gptq": Format("uint4", 128),
    "awq": Format("uint4", 128, zeros=True),
    "int4 32": Format("uint4", 32),
    "mxfp4": Format("e2m1", 32, scales=torch.uint8),
    "nvfp4": Format("e2m1", 16, scales=torch.float8_e4m3fn, factors=True),
}


@dataclass(frozen=True)
class Shape:
    outputs: int
    inputs: int
    gated: bool = False

    def __str__(self) -> str:
        return f"{'g' * self.gated}{self.outputs}x{self.inputs}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        outputs, _, inputs = text.removeprefix("g").partition("x")
        return cls(int(outputs), int(inputs), text.startswith("g"))


SHAPES = [Shape(6144, 4096), Shape(4096, 4096), Shape(14336, 4096, True), Shape(4096, 14336)]


def random_codes(form: Format, shape: Shape) -> Codes:
    """Random weights whose products with normal inputs are near 1."""
    n, k = shape.outputs * (2 if shape.gated else 1), shape.inputs
    unit = form.unit or k
    grid = (-(-n // form.rows_unit), -(-k // unit))
    size = 1 / ({"uint4": 4.6, "e2m1": 3.0, "int8": 74.0, "e4m3": 1.0}[form.kind] * k**0.5)
    values = torch.randint(0, 256, (n, k // 2 if form.kind in PACKED else k), dtype=torch.uint8, device=DEVICE)
    if form.kind == "int8":
        values = values.view(torch.int8)
    elif form.kind == "e4m3":
        values = torch.randn(n, k, device=DEVICE, dtype=BF16).to(torch.float8_e4m3fn)
    if form.scales == torch.uint8:
        scales = torch.randint(118, 122, grid, dtype=torch.uint8, device=DEVICE)
    else:
        lift = 256.0 if form.factors else 1.0
        scales = ((torch.rand(grid, device=DEVICE) + 0.5) * size * lift).to(form.scales)
    return Codes(
        form.kind,
        k,
        values,
        scales,
        rows=None if form.rows_unit == 1 else torch.arange(n, dtype=torch.int32, device=DEVICE) // form.rows_unit,
        unit=unit,
        zero=8 if form.kind == "uint4" else 0,
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8, device=DEVICE) if form.zeros else None,
        factors=torch.full((n,), 1 / 256, device=DEVICE) if form.factors else None,
        rounds=form.kind in ("e4m3", "int8"),
    )


Config = CodesConfig | CodesGemvConfig | CodesRingConfig
NAMES = {CodesConfig: "linear", CodesGemvConfig: "gemv", CodesRingConfig: "ring"}


def picked(rows: int, codes: Codes, shape: Shape) -> Config:
    multiprocessors, hopper = num_multiprocessors(DEVICE), is_hopper(DEVICE)
    ring = pick_codes_ring(rows, codes, gated=shape.gated, multiprocessors=multiprocessors, hopper=hopper)
    return ring or picked_before(rows, codes, shape)


def picked_before(rows: int, codes: Codes, shape: Shape) -> CodesConfig | CodesGemvConfig:
    """Where nothing comes through a ring."""
    multiprocessors, hopper = num_multiprocessors(DEVICE), is_hopper(DEVICE)
    few = pick_codes_gemv(rows, codes, gated=shape.gated, multiprocessors=multiprocessors, hopper=hopper)
    return few or picked_linear(rows, codes, shape)


def picked_linear(rows: int, codes: Codes, shape: Shape) -> CodesConfig:
    config = pick_codes(
        min(rows, MOST_ROWS),
        shape.outputs,
        shape.inputs,
        packed=codes.kind in PACKED,
        gated=shape.gated,
        multiprocessors=num_multiprocessors(DEVICE),
        large=is_hopper(DEVICE),
    )
    assert config is not None
    return config


def multiplied(x: torch.Tensor, codes: Codes, scratch: GemvScratch, config: Config, **options: Any) -> torch.Tensor:
    if isinstance(config, CodesConfig):
        return codes_linear(x, codes, scratch, config=config, pdl=True, **options)
    if "norm" in options and len(x) > 1:
        weight, eps = options.pop("norm")
        x = rms_norm(x, weight, eps, pdl=True)
    if isinstance(config, CodesRingConfig):
        return codes_ring(x, codes, config=config, pdl=True, **options)
    return codes_gemv(x, codes, config=config, pdl=True, **options)


def scaled(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    config = gemm_config(codes, len(x), capability(DEVICE), shared_memory(DEVICE), num_multiprocessors(DEVICE))
    assert codes.kind in ("e4m3", "int8")
    q, scales = quantize_rows(x, codes.kind, None if codes.scales.shape[1] == 1 else config.block_k)
    return scaled_gemm(q, scales, codes, config, out=x.new_empty(len(x), codes.outputs))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def bench_correct(args: argparse.Namespace) -> None:
    """Each kernel against float64; bfloat16 results are within 4e-3, gated ones within 8e-3, rounded inputs 5e-2."""
    row("relative error", "rows", "stored", "gated", "8 bits", "decoded")
    scratch = GemvScratch.allocate(DEVICE)
    for name, rows in itertools.product(args.kinds, args.rows or (1, 3, 16, 17, 40, 200, 600)):
        shape = Shape(1000, 1152)
        codes = random_codes(FORMATS[name], shape)
        x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
        want = codes_linear_reference(x.double(), codes)
        cells = ["-", "-", "-", f"{error(decoded_linear(x, codes), want):.1e}"]
        if rows <= MOST_ROWS:
            out = torch.full((rows, 1000), torch.nan, device=DEVICE, dtype=BF16)
            multiplied(x, codes, scratch, picked(rows, codes, shape), out=out)
            cells[0] = f"{error(out, want):.1e}"
            half = Shape(500, shape.inputs, True)
            options: dict[str, Any] = {"activation": "silu"}
            if rows <= 16:
                options["norm"] = (torch.rand(shape.inputs, device=DEVICE, dtype=BF16) + 0.5, 1e-6)
            out = multiplied(x, codes, scratch, picked(rows, codes, half), **options)
            if rows <= 16:
                options["norm"] = (options["norm"][0].double(), 1e-6)
            cells[1] = f"{error(out, codes_linear_reference(x.double(), codes, **options)):.1e}"
        if pick_way(99999, codes, capability(DEVICE), 1) == "scaled":
            cells[2] = f"{error(scaled(x, codes), want):.1e}"
        row(name, rows, *cells)


def copies(form: Format, shape: Shape) -> list[Codes]:
    first = random_codes(form, shape)
    return [first, *(random_codes(form, shape) for _ in range(max(1, min(23, L2 // first.nbytes))))]


def in_turns(call: Callable[[Codes], object], held: list[Codes]) -> float:
    """Microseconds of a call, the weights taken in turns."""
    return graph_us([partial(call, codes) for codes in held * max(1, 20 // len(held))])


def fused(shape: Shape, x: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
    """What a decode step has within the linear."""
    if shape.gated:
        return {"norm": (x[0], 1e-6), "activation": "silu"}
    return {"residual_TO": out} if shape.outputs <= shape.inputs else {"norm": (x[0], 1e-6)}


def stored(rows: int, held: list[Codes], shape: Shape, scratch: GemvScratch, config: Config) -> float:
    x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
    out = torch.empty(rows, shape.outputs, device=DEVICE, dtype=BF16)
    options = fused(shape, x, out)
    if rows > 16:
        options.pop("norm", None)
    return in_turns(lambda codes: multiplied(x, codes, scratch, config, out=out, **options), held)


def cublas(rows: int, shape: Shape) -> float:
    """The plain linear in bfloat16, as a model that was decoded at load has it."""
    n = shape.outputs * (2 if shape.gated else 1)
    count = max(2, min(6, L2 // (n * shape.inputs * 2)))
    weights = [torch.randn(n, shape.inputs, device=DEVICE, dtype=BF16) for _ in range(count)]
    x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
    return graph_us([partial(torch.nn.functional.linear, x, weight) for weight in weights * max(1, 12 // count)])


def bench_few(args: argparse.Namespace) -> None:
    peak = next((rate for name, rate in BANDWIDTH.items() if name in torch.cuda.get_device_name()), 4.8e12)
    row("1 to 16 rows", "rows", "us", "TB/s", "of floor", "decode us", "cuBLAS us", "kernel")
    scratch = GemvScratch.allocate(DEVICE)
    for shape in args.shapes:
        plain = {rows: cublas(rows, shape) for rows in args.rows or (1, 4, 16)}
        for name in args.kinds:
            held = copies(FORMATS[name], shape)
            before = in_turns(lambda codes: decode_rows(codes, 0, codes.outputs, BF16), held)
            for rows, theirs in plain.items():
                config = picked(rows, held[0], shape)
                us = stored(rows, held, shape, scratch, config)
                rate = held[0].nbytes / us * 1e6
                row(f"{name} {shape}", rows, f"{us:.2f}", f"{rate / 1e12:.2f}", f"{rate / peak:.0%}", f"{before:.1f}",
                    f"{theirs:.1f}", NAMES[type(config)])  # fmt: skip


def bench_layer(args: argparse.Namespace) -> None:
    """Linears that follow each other, as in a step of one sequence but for what is between them: a kernel's first reads
    are out while the one before still runs, so their times do not add up."""
    row("one row, us of all linears in turn", "gemv", "picked")
    scratch = GemvScratch.allocate(DEVICE)
    for name in args.kinds:
        layers = [[random_codes(FORMATS[name], shape) for shape in args.shapes] for _ in range(4)]
        xs = [torch.randn(1, shape.inputs, device=DEVICE, dtype=BF16) for shape in args.shapes]
        outs = [torch.empty(1, shape.outputs, device=DEVICE, dtype=BF16) for shape in args.shapes]
        times = []
        for pick in (picked_before, picked):
            calls: list[Callable[[], object]] = [
                partial(multiplied, x, codes, scratch, pick(1, codes, shape), out=out, **fused(shape, x, out))
                for layer in layers * 2
                for shape, x, codes, out in zip(args.shapes, xs, layer, outs, strict=True)
            ]
            times.append(f"{graph_us(calls) * len(args.shapes):.2f}")
        row(name, *times)


def bench_many(args: argparse.Namespace) -> None:
    """decoded: with the decoding. The way that is picked has a star."""
    row("17 rows and more, us", "rows", "stored", "8 bits", "decoded", "cuBLAS", "_scaled_mm")
    scratch = GemvScratch.allocate(DEVICE)
    for shape in args.shapes:
        for rows in args.rows or (32, 64, 128, 256, 512, 2048, 8192):
            theirs = cublas(rows, shape)
            x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
            for name in args.kinds:
                held = copies(FORMATS[name], shape)[:4]
                times = dict.fromkeys(("stored", "scaled", "decoded"), float("nan"))
                if rows <= MOST_ROWS:
                    times["stored"] = stored(rows, held, shape, scratch, picked(rows, held[0], shape))
                if pick_way(99999, held[0], capability(DEVICE), 1) == "scaled":
                    times["scaled"] = in_turns(partial(scaled, x), held)
                times["decoded"] = in_turns(partial(decoded_linear, x), held)
                way = pick_way(rows, held[0], capability(DEVICE), num_multiprocessors(DEVICE))
                cells = [f"{us:.1f}{'*' * (one == way)}" for one, us in times.items()]
                row(f"{name} {shape}", rows, *cells, f"{theirs:.1f}", scaled_mm(name, x, held))


def scaled_mm(name: str, x: torch.Tensor, held: list[Codes]) -> str:
    """What torch has for rows and outputs with a scale each, x rounded by our kernel before."""
    if name != "fp8 channel":
        return "-"

    def call(codes: Codes) -> torch.Tensor:
        q, scales = quantize_rows(x, "e4m3")
        found: torch.Tensor = torch._scaled_mm(q, codes.values.T, scales, codes.scales.T, out_dtype=BF16)
        return found

    try:
        return f"{in_turns(call, held):.1f}"
    except RuntimeError as failed:
        return str(failed).splitlines()[0][:40]


def configs(rows: int, picked: CodesConfig, row_bytes: int) -> Iterator[CodesConfig]:
    """Those to try around the one that is picked."""
    prefetches: tuple[int, ...]
    if rows <= 16:
        tiles = [(32, 1), (64, 2), (128, 2), (128, 4)]
        stages, prefetches, splits = (3, 4, 6), (0, picked.prefetch), (1, 2, 4, 8)
    else:
        tiles = [(64, 2), (64, 4), (128, 4), (128, 8)]
        stages, prefetches, splits = (2, 3, 4), (0,), (1, 2, 4, 8)
    heights = {picked.block_m} if rows <= 16 else {32, 64, 128} & set(range(max(32, rows // 2), 2 * rows + 1))
    for (block_n, warps), stage, prefetch, split, block_m in itertools.product(
        tiles, stages, prefetches, splits, heights
    ):
        if split * picked.bytes * 2 <= row_bytes:
            yield CodesConfig(block_m, block_n, picked.bytes, split, warps, stage, prefetch)


def bench_sweep(args: argparse.Namespace) -> None:
    row("sweep", "rows", "us", "block_m", "block_n", "warps", "stages", "prefetch", "splits")
    scratch = GemvScratch.allocate(DEVICE, partial_elements=1 << 25)
    for name, shape, rows in itertools.product(args.kinds, args.shapes, args.rows or (1, 16, 64)):
        held = copies(FORMATS[name], shape)
        row_bytes = held[0].values.shape[1]
        default = picked_linear(rows, held[0], shape)
        times: dict[CodesConfig, float] = {}
        for config in {default, *configs(rows, default, row_bytes)}:
            try:
                times[config] = stored(rows, held, shape, scratch, config)
            except (triton.runtime.errors.OutOfResources, RuntimeError):
                continue
        best = sorted(times, key=times.__getitem__)[:4]
        for config in [*best, default]:
            mark = " picked" if config == default else ""
            row(f"{name} {shape}{mark}", rows, f"{times[config]:.2f}", config.block_m, config.block_n, config.num_warps,
                config.num_stages, config.prefetch, config.split_k)  # fmt: skip


SECTIONS = {"correct": bench_correct, "few": bench_few, "layer": bench_layer, "many": bench_many, "sweep": bench_sweep}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--kinds", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=[])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES)
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name in args.sections or ("correct", "few", "layer", "many"):
        SECTIONS[name](args)
        print()


if __name__ == "__main__":
    main()
