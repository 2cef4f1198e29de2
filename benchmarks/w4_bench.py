"""Times linears of 4-bit codes of 33 to 512 rows on one GPU: `wide_gemm` beside what is in use and bfloat16 weights.

    PYTHONPATH=. python benchmarks/w4_bench.py [--rows 64 128 256 512] [--only qkv o gate_up down] [--dry-run]

The four linears of a Llama-8B layer; gate_up with its activation. Of each several copies are replayed in turn from one
CUDA graph, so that no call finds its weights in the L2 cache. us, of all launches of a call; "reorder" is the one
before the products alone, which an engine has with the norm before qkv and gate_up. A configuration of `wide_gemm` is
rows of a tile x groups of warps, stages, parts of the input, or all shared out evenly; "*": what is picked. Every time
stands beside the error of its result, from what the codes stand for in float32, and is marked where that is not small.
In the end a layer's four linears in turn, each as it is picked. First errors of small linears of other kinds are told.
All kernels are compiled before, a process a core; --dry-run ends there, and needs no GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from compiling import compile_all
from kernel_timing import BF16, graph_us, row

from tpctl.kernels.common.activation import Activation, act_and_mul, act_and_mul_reference
from tpctl.kernels.common.ahead import KernelSpec, compile_for, unlaunched
from tpctl.kernels.common.codes import Codes, decode
from tpctl.kernels.common.launch import DeviceFacts, capability, is_hopper, num_multiprocessors, stand_for
from tpctl.kernels.common.norm import rms_norm
from tpctl.kernels.linear.codes_gemm import decoded_linear, pick_way
from tpctl.kernels.linear.codes_linear import codes_linear, pick_codes
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.kernels.linear.packed_gemm import packed_gemm, pick_packed
from tpctl.kernels.linear.wide_gemm import WideConfig, pick_wide, reorder, wide_gemm

H200 = DeviceFacts((9, 0), 132, 232448)
ROWS = (64, 128, 256, 512)


class Matrix(NamedTuple):
    """A linear; how many copies are more than the L2 cache holds, of codes and of bfloat16 numbers."""

    outputs: int
    columns: int
    gated: bool
    copies: int
    dense_copies: int


MATRICES = {
    "qkv": Matrix(6144, 4096, False, 8, 3),
    "o": Matrix(4096, 4096, False, 12, 4),
    "gate_up": Matrix(28672, 4096, True, 3, 2),
    "down": Matrix(4096, 14336, False, 4, 2),
}
TILES = {
    64: (WideConfig(64, 2, 8), WideConfig(64, 2, 4), WideConfig(64, 1, 10)),
    128: (WideConfig(128, 2, 5), WideConfig(64, 2, 8), WideConfig(128, 1, 6)),
    256: (WideConfig(256, 2, 3), WideConfig(128, 2, 5), WideConfig(256, 1, 3), WideConfig(64, 2, 8)),
    512: (WideConfig(256, 2, 3), WideConfig(128, 2, 5)),
}
"""Of so many rows, each with the parts that may pay."""


def configs_for(rows: int, matrix: Matrix, picked: WideConfig | None, multiprocessors: int) -> Iterator[WideConfig]:
    found = [] if picked is None else [picked]
    groups = matrix.columns // 128
    for tile in TILES[min(one for one in TILES if one >= rows or one == 512)]:
        tiles = -(-rows // tile.rows) * -(-matrix.outputs // (64 * tile.warpgroups))
        most = max(1, multiprocessors // tiles)
        splits = {0, 1} if 2 * tiles > multiprocessors else {0, most // 2, most}
        found += [tile._replace(split=one) for one in sorted(splits) if groups >= 4 * one]
    yield from dict.fromkeys(found)


def made_codes(matrix: Matrix, device: torch.device) -> Codes:
    """Random ones, symmetric as GPTQ mostly has them."""
    values = torch.randint(0, 256, (matrix.outputs, matrix.columns // 2), device=device, dtype=torch.uint8)
    scales = torch.rand(matrix.outputs, matrix.columns // 128, device=device).add_(0.5)
    return Codes("uint4", matrix.columns, values, scales.mul_(0.2 * matrix.columns**-0.5).to(BF16), unit=128, zero=8)


def in_use(x: torch.Tensor, codes: Codes, matrix: Matrix, scratch: GemvScratch) -> torch.Tensor:
    """As `layers.weights.codes_cuda` has it without `wide_gemm`."""
    rows, device = len(x), x.device
    arch, multiprocessors = capability(device), num_multiprocessors(device)
    config = pick_packed(rows, codes, arch, multiprocessors)
    if config is not None:
        out = packed_gemm(x, codes, config, pdl=True)
    elif pick_way(rows, codes, arch, multiprocessors) == "stored":
        width = 2 if matrix.gated else 1
        how = pick_codes(
            rows, codes.outputs // width, codes.columns, packed=True, gated=matrix.gated,
            multiprocessors=multiprocessors, large=is_hopper(device),
        )  # fmt: skip
        assert how is not None
        return codes_linear(x, codes, scratch, activation="silu" if matrix.gated else None, config=how, pdl=True)
    else:
        out = decoded_linear(x, codes, pdl=True)
    return act_and_mul(out, pdl=True) if matrix.gated else out


def wide(x: torch.Tensor, codes: Codes, matrix: Matrix, config: WideConfig, scratch: GemvScratch) -> torch.Tensor:
    return wide_gemm(x, codes, scratch, config, activation="silu" if matrix.gated else None, pdl=True)


def dense(x: torch.Tensor, weight: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    out = torch.nn.functional.linear(x, weight)
    return act_and_mul(out, pdl=True) if matrix.gated else out


def picked_for(rows: int, codes: Codes, device: torch.device) -> WideConfig | None:
    return pick_wide(rows, codes, multiprocessors=num_multiprocessors(device), hopper=is_hopper(device))


class Check(NamedTuple):
    """A small linear with what may stand around it."""

    rows: int
    config: WideConfig
    zeros: bool = False
    gated: bool = False
    residual: bool = False

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, Codes]:
        codes = made_codes(Matrix(1000, 1024, self.gated, 1, 1), device)
        if self.zeros:
            zeros = torch.randint(0, 16, codes.scales.shape, device=device, dtype=torch.uint8)
            codes = Codes("uint4", 1024, codes.values, codes.scales, unit=128, zeros=zeros)
        return torch.randn(self.rows, 1024, device=device, dtype=BF16), codes

    def result(self, x: torch.Tensor, codes: Codes, scratch: GemvScratch) -> torch.Tensor:
        residual = x[:, :1000] if self.residual else None
        activation: Activation | None = "silu" if self.gated else None
        return wide_gemm(x, codes, scratch, self.config, activation=activation, residual_TN=residual, pdl=True)

    def run(self, device: torch.device, scratch: GemvScratch) -> None:
        x, codes = self.inputs(device)
        want = x.float() @ decode(codes).T
        want = act_and_mul_reference(want) if self.gated else want
        want = want + x[:, :1000].float() if self.residual else want
        print(f"{self}: ", end="", flush=True)
        print(
            error(self.result(x, codes, scratch), want), "counters left" if scratch.counters.any() else "", flush=True
        )


CHECKS = (
    Check(60, WideConfig(64, 2, 8)),
    Check(200, WideConfig(256, 2, 3), zeros=True),
    Check(200, WideConfig(64, 1, 10), residual=True),
    Check(100, WideConfig(128, 2, 5), gated=True),
    Check(100, WideConfig(128, 2, 5, 2), zeros=True, residual=True),
    Check(60, WideConfig(64, 2, 8, 0)),
    Check(300, WideConfig(256, 2, 3, 0), zeros=True, residual=True),
    Check(300, WideConfig(256, 2, 3, 0), gated=True),
)
"""Those that wait for each other last."""


def specs_of(names: list[str], all_rows: list[int], facts: DeviceFacts) -> list[KernelSpec]:
    """All kernels that will be launched."""
    stand_for(facts)
    meta, found = torch.device("meta"), dict[KernelSpec, None]()
    scratch = GemvScratch.allocate(meta)
    with unlaunched(found):
        for check in CHECKS:
            check.result(*check.inputs(meta), scratch)
        for name in names:
            matrix = MATRICES[name]
            codes = made_codes(matrix, meta)
            for rows in all_rows:
                x = torch.empty(rows, matrix.columns, device=meta, dtype=BF16)
                in_use(x, codes, matrix, scratch)
                reorder(x, norm=(x[0], 1e-5), pdl=True)
                rms_norm(x, x[0], 1e-5, pdl=True)
                picked = pick_wide(rows, codes, multiprocessors=facts.multiprocessors, hopper=True)
                for config in configs_for(rows, matrix, picked, facts.multiprocessors):
                    wide(x, codes, matrix, config, scratch)
    return list(found)


def error(got: torch.Tensor, want: torch.Tensor) -> str:
    off = float((got.float() - want).norm() / want.norm())
    return f"{off:.1e}" if off < 1e-2 else f"WRONG {off:.1e}"


def line(
    name: str,
    call: Callable[..., torch.Tensor],
    held: list[torch.Tensor] | list[Codes],
    want: torch.Tensor | None,
) -> None:
    """call: of one of what is held."""
    try:
        verdict = "" if want is None else error(call(held[0]), want)
        us = graph_us([partial(call, one) for one in held], 3)
    except Exception as failed:  # it takes more than there is: the next one may not
        row(name, f"{type(failed).__name__}: {str(failed).splitlines()[0][:80]}")
        return
    row(name, f"{us:.1f}", verdict)


def told(config: WideConfig) -> str:
    parts = f"{config.split} parts" if config.split else "shared out"
    return f"{config.rows} x {config.warpgroups}, {config.stages} stages, {parts}"


def bench(name: str, all_rows: list[int], device: torch.device) -> None:
    matrix, scratch = MATRICES[name], GemvScratch.allocate(device)
    held = [made_codes(matrix, device) for _ in range(matrix.copies)]
    numbers = [decode(one, dtype=BF16) for one in held[: matrix.dense_copies]]
    for rows in all_rows:
        x = torch.randn(rows, matrix.columns, device=device, dtype=BF16)
        want = x.float() @ decode(held[0]).T
        if matrix.gated:
            want = act_and_mul_reference(want)
        row(f"{name} {matrix.outputs}x{matrix.columns}, {rows} rows", "us", "error")
        line("bfloat16, cuBLAS", lambda one: dense(x, one, matrix), numbers, want)  # noqa: B023
        line("in use", lambda one: in_use(x, one, matrix, scratch), held, want)  # noqa: B023
        weight = x[0] + 1
        line("reorder", lambda one: reorder(x, pdl=True), held, None)  # noqa: B023
        line("norm", lambda one: rms_norm(x, weight, 1e-5, pdl=True), held, None)  # noqa: B023
        line("norm and reorder", lambda one: reorder(x, norm=(weight, 1e-5), pdl=True), held, None)  # noqa: B023
        picked = picked_for(rows, held[0], device)
        for config in configs_for(rows, matrix, picked, num_multiprocessors(device)):
            scratch.counters.zero_()  # should the one before have failed
            which = f"wide{'*' if config == picked else ''} {told(config)}"
            line(which, lambda one: wide(x, one, matrix, config, scratch), held, want)  # noqa: B023


def layers(all_rows: list[int], device: torch.device) -> None:
    """Four linears in turn."""
    scratch, count = GemvScratch.allocate(device), 3
    held = [[(one, made_codes(one, device)) for one in MATRICES.values()] for _ in range(count)]
    numbers = [[(one, decode(codes, dtype=BF16)) for one, codes in layer] for layer in held]

    def in_turn(xs: dict[int, torch.Tensor], layer: list[tuple[Matrix, Codes]], picks: bool) -> None:
        for matrix, codes in layer:
            x = xs[matrix.columns]
            config = picked_for(len(x), codes, device) if picks else None
            if config is None:
                in_use(x, codes, matrix, scratch)
            else:
                wide(x, codes, matrix, config, scratch)

    def by_cublas(xs: dict[int, torch.Tensor], layer: list[tuple[Matrix, torch.Tensor]]) -> None:
        for matrix, weight in layer:
            dense(xs[matrix.columns], weight, matrix)

    row("a layer's linears in turn, us", "bfloat16", "in use", "picked")
    for rows in all_rows:
        xs = {columns: torch.randn(rows, columns, device=device, dtype=BF16) for columns in (4096, 14336)}
        row(
            f"{rows} rows",
            f"{graph_us([partial(by_cublas, xs, one) for one in numbers], 3):.1f}",
            f"{graph_us([partial(in_turn, xs, one, False) for one in held], 3):.1f}",
            f"{graph_us([partial(in_turn, xs, one, True) for one in held], 3):.1f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--only", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--dry-run", action="store_true", help="compile for an H200, time nothing")
    args = parser.parse_args()
    start = time.monotonic()
    if args.dry_run:
        compile_for(H200)
    facts = H200 if args.dry_run else DeviceFacts.of(torch.device("cuda"))
    specs = specs_of(args.only, args.rows, facts)
    failed = compile_all(specs, facts)
    print(
        f"{len(specs) - len(failed)} kernels compiled, {time.monotonic() - start:.1f} s", *failed, sep="\n", flush=True
    )
    if args.dry_run:
        raise SystemExit(bool(failed))
    torch.manual_seed(0)
    stand_for(None)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with torch.inference_mode():
        scratch = GemvScratch.allocate(torch.device("cuda"))
        for check in CHECKS:
            check.run(torch.device("cuda"), scratch)
        for name in args.only:
            bench(name, args.rows, torch.device("cuda"))
            torch.cuda.empty_cache()
            print(f"{time.monotonic() - start:.1f} s", flush=True)
        if len(args.only) == len(MATRICES):
            layers(args.rows, torch.device("cuda"))
            print(f"{time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
