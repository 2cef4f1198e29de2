"""Times few rows' linears of codes through a ring in shared memory beside ``codes_gemv``, on one GPU.

    PYTHONPATH=. python benchmarks/w4_bench.py [--shapes 4096x4096 g14336x4096]

Every variant is compared with float64 first (relative error; bfloat16 results are within 4e-3, gated ones within 8e-3);
one that is wrong is not timed. Then us of a call, and TB/s of the codes and scales read, in a CUDA graph whose launches
rotate through more weights than the L2 cache holds. Processes of their own compile the kernels first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from codes_bench import FORMATS, SHAPES, Shape, copies, error, in_turns, picked, random_codes
from kernel_timing import BF16, DEVICE, graph_us, row

import tpctl.kernels.linear.codes_ring as codes_ring_module
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import num_multiprocessors
from tpctl.kernels.linear import codes_ring_kernels
from tpctl.kernels.linear.codes_gemv import CodesGemvConfig, codes_gemv
from tpctl.kernels.linear.codes_linear import codes_linear_reference
from tpctl.kernels.linear.codes_ring import CodesRingConfig, codes_ring

Call = Callable[..., torch.Tensor]
CASES = [(True, 1), (False, 1), (True, 2), (True, 4), (True, 8)]
"""Whether all is fused that a step has, and rows."""
COMPILERS = 3
"""Processes for a shape."""


def configs(kind: str, shape: Shape, rows: int) -> Iterator[CodesRingConfig]:
    one, two = num_multiprocessors(DEVICE), 2 * num_multiprocessors(DEVICE)
    long = shape.inputs % 8192 == 6144  # 112 groups
    if rows > 1 and not long:
        for wide in (0, 2) if kind == "gptq" else (0,):
            yield CodesRingConfig(8, min(4, 8 // rows), rows if kind == "gptq" else max(1, rows // 2), one, wide)
    elif rows > 1 and rows <= 4:
        yield CodesRingConfig(8, 2, 3 if kind == "gptq" else 2, one)
    elif rows > 1:
        return
    elif kind != "gptq":
        cuts = [(8, 7, 1), (8, 2, 2), (8, 2, 3)] if long else [(8, 4, 1), (8, 2, 2), (8, 2, 3)]
        yield from (CodesRingConfig(*cut, one) for cut in cuts)
        yield CodesRingConfig(4, 7 if long else 8, 1, two)
        yield CodesRingConfig(8, 2, 2, two)
    elif long:
        yield from (CodesRingConfig(8, 7, 1, one, wide) for wide in range(4))
        yield CodesRingConfig(8, 2, 5, one, 2)
        yield CodesRingConfig(16, 7, 1, one, 2, 64)
        yield CodesRingConfig(4, 7, 2, two, 2)
    else:
        yield from (CodesRingConfig(8, 4, 2, one, wide) for wide in range(4))
        yield CodesRingConfig(8, 4, 3, one, 2)
        yield CodesRingConfig(16, 2, 2, one, 2, 64)
        yield CodesRingConfig(4, 8, 2, two)
        yield CodesRingConfig(4, 8, 2, two, 2)
        yield CodesRingConfig(8, 4, 2, two, 2)


def layers(kind: str) -> dict[str, list[CodesRingConfig]]:
    """Cuts of qkv, o, gate and up, down, one after the other."""
    one, two = num_multiprocessors(DEVICE), 2 * num_multiprocessors(DEVICE)
    found: dict[str, list[CodesRingConfig]] = {}
    if kind != "gptq":
        short, pair = CodesRingConfig(8, 4, 1, one), CodesRingConfig(4, 8, 1, two)
        deep, long, less = CodesRingConfig(8, 2, 3, one), CodesRingConfig(8, 7, 1, one), CodesRingConfig(8, 2, 3, one)
        found["8 4 1, down 8 7 1"] = [short, short, short, long]
        found["8 4 1, down 8 2 3"] = [short, short, short, less]
        found["8 2 3, down 8 2 3"] = [deep, deep, deep, less]
        found["gate 4 8 1, down 8 2 3"] = [short, short, pair, less]
        found["o and gate 4 8 1, down 8 2 3"] = [short, pair, pair, less]
        return found
    for wide in range(4):
        small, deep = CodesRingConfig(8, 4, 2, one, wide), CodesRingConfig(8, 4, 3, one, wide)
        long, pair = CodesRingConfig(8, 7, 1, one, wide), CodesRingConfig(4, 8, 2, two, wide)
        found[f"8 4 2, down 8 7 1, {wide}"] = [small, small, small, long]
        if wide in (0, 2):
            found[f"gate 8 4 3, {wide}"] = [small, small, deep, long]
            found[f"gate 4 8 2, {wide}"] = [small, small, pair, long]
            found[f"o 4 8 2, {wide}"] = [small, pair, small, long]
            found[f"o 4 8 2, gate 8 4 3, {wide}"] = [small, pair, deep, long]
            found[f"o and gate 4 8 2, {wide}"] = [small, pair, pair, long]
            found[f"gate 8 4 2 twice, {wide}"] = [small, small, CodesRingConfig(8, 4, 2, two, wide), long]
    return found


def variants(kind: str, shape: Shape, codes: Codes, rows: int) -> Iterator[tuple[str, Call]]:
    gemv = picked(rows, codes, shape)
    assert isinstance(gemv, CodesGemvConfig)
    yield "gemv", partial(codes_gemv, config=gemv, pdl=True)
    for number, config in enumerate(configs(kind, shape, rows)):
        yield f"ring {' '.join(map(str, config[:5]))}", partial(codes_ring, config=config, pdl=True)
        if number == 0 and rows == 1:
            yield "  launched after the one before", partial(codes_ring, config=config)
            yield "  copies alone, no products", partial(without_products, config=config, pdl=True)


def without_products(x: torch.Tensor, codes: Codes, **given: Any) -> torch.Tensor:
    """The same kernel, whose tiles only pass the sums on: what is left is reading."""
    before = codes_ring_module.codes_ring_kernel
    codes_ring_module.codes_ring_kernel = _without_products()
    try:
        return codes_ring(x, codes, **given)
    finally:
        codes_ring_module.codes_ring_kernel = before


@cache
def _without_products() -> Any:
    source = Path(codes_ring_kernels.__file__).read_text()
    moves = "".join(f"mov.f32 ${i}, ${i + 32}; " for i in range(8))
    place = Path(gettempdir()) / "w4_bench_without_products.py"
    place.write_text(source.replace("gl.constexpr(_tile_assembly(wide))", f"gl.constexpr({moves!r})"))
    spec = spec_from_file_location("w4_bench_without_products", place)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.codes_ring_kernel


def options(shape: Shape, fused: bool, rows: int) -> dict[str, Any]:
    """What a decode step has within the linear, but the norm of more than one row; without, a gate is left."""
    weight = torch.rand(shape.inputs, device=DEVICE, dtype=BF16) + 0.5
    if shape.gated:
        return {"activation": "silu"} | ({"norm": (weight, 1e-6)} if fused and rows == 1 else {})
    if shape.outputs <= shape.inputs:
        return {"residual_TO": torch.randn(rows, shape.outputs, device=DEVICE, dtype=BF16)} if fused else {}
    return {"norm": (weight, 1e-6)} if fused and rows == 1 else {}


def wide(given: dict[str, Any]) -> dict[str, Any]:
    """Options of a reference in float64."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            value = value.double()
        elif isinstance(value, tuple):
            value = (value[0].double(), value[1])
        found[name] = value
    return found


def compile_some(kind: str, shape: Shape, part: int) -> None:
    codes = random_codes(FORMATS[kind], shape)
    jobs = [
        (partial(call, **options(shape, fused, rows)), rows)
        for fused, rows in CASES
        for _, call in list(variants(kind, shape, codes, rows))[: None if fused else 2]
    ]
    for call, rows in jobs[part::COMPILERS]:
        try:
            call(torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16), codes)
        except Exception as failed:  # said when it is to be timed
            print(type(failed).__name__, file=sys.stderr)
    torch.cuda.synchronize()


def bench(kind: str, shape: Shape) -> Call:
    """Returns ``codes_gemv`` with what a decode step has within."""
    gemv: Call = codes_gemv
    held = copies(FORMATS[kind], shape)
    for fused, rows in CASES:
        x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
        given = options(shape, fused, rows)
        want = codes_linear_reference(x.double(), held[0], **wide(given))
        out = torch.empty(rows, shape.outputs, device=DEVICE, dtype=BF16)
        for name, call in list(variants(kind, shape, held[0], rows))[: None if fused else 2]:
            label = f"{kind} {shape}{'' if fused else ' alone'} {rows}: {name}"
            try:
                out.fill_(torch.nan)
                call(x, held[0], out=out, **given)
                far = error(out, want)
                if not far < 8e-3 and "no products" not in name:
                    row(label, f"{far:.1e}", "WRONG")
                    continue
                us = in_turns(partial(call, x, out=out, **given), held)
                row(label, f"{far:.1e}", f"{us:.2f}", f"{held[0].nbytes / us / 1e6:.2f}")
                if name == "gemv" and rows == 1 and fused:
                    gemv = partial(call, **given)
            except Exception as failed:
                row(label, type(failed).__name__, str(failed).splitlines()[0][:60] if str(failed) else "")
    return gemv


def bench_layer(kind: str, shapes: list[Shape], gemvs: list[Call]) -> None:
    """The linears of a layer one after the other, as a decode step has them but for attention."""
    weights = [[random_codes(FORMATS[kind], shape) for shape in shapes] for _ in range(4)]
    xs = [torch.randn(1, shape.inputs, device=DEVICE, dtype=BF16) for shape in shapes]
    outs = [torch.empty(1, shape.outputs, device=DEVICE, dtype=BF16) for shape in shapes]
    given = [options(shape, True, 1) for shape in shapes]
    ways: dict[str, list[Call]] = {"gemv": gemvs}
    for name, cuts in layers(kind).items():
        ways[name] = [partial(codes_ring, config=cut, pdl=True, **more) for cut, more in zip(cuts, given, strict=True)]
    for name, four in ways.items():
        calls: list[Callable[[], object]] = [
            partial(call, x, codes, out=out)
            for layer in weights * 2
            for call, x, codes, out in zip(four, xs, layer, outs, strict=True)
        ]
        row(f"a layer, {kind}: {name}", "", f"{graph_us(calls) * len(shapes):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES)
    parser.add_argument("--kinds", nargs="+", default=["gptq", "fp8 channel"])
    parser.add_argument("--compile", type=int, help="for the first kind and shape: compile one of so many parts")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.compile is not None:
        compile_some(args.kinds[0], args.shapes[0], args.compile)
        return
    started = time.monotonic()
    command = [sys.executable, __file__]
    builders = [
        subprocess.Popen([*command, "--kinds", kind, "--shapes", str(shape), "--compile", str(part)])
        for kind in args.kinds
        for shape in args.shapes
        for part in range(COMPILERS)
    ]
    for builder in builders:
        builder.wait()
    print(f"{torch.cuda.get_device_name()}, compiled in {time.monotonic() - started:.0f} s", flush=True)
    row("warps, run, ahead, programs, wide", "error", "us", "TB/s")
    for kind in args.kinds:
        bench_layer(kind, args.shapes, [bench(kind, shape) for shape in args.shapes])
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
