"""Finds which way, and which tiles, quantised linears and experts of many rows take on one GPU.

    PYTHONPATH=. python benchmarks/codes_sweep.py [experts] [packed] [dense] [int4] [--seconds 120] [--rows 64 256]
        [--only 6144x4096]

dense: FP8 with a scale an output ("channel") and for blocks of 128 x 128, of Llama-8B and of Qwen3-30B-A3B: ours,
cuBLAS' (rounding x counted in both) and cuBLAS in bfloat16. int4: groups of 128, as they are and decoded before.
experts: Qwen3-30B-A3B's in blocks. packed: gpt-oss-20b's in MXFP4 and Qwen3-30B-A3B's in 4 bits, by tiles of codes,
gate_up and down apart, and by numbers decoded before. Every figure is us, the median of replays of a CUDA graph that
goes through more weights than the L2 cache holds; "!" behind one: its result was further from the reference than its
format explains. Kernels are compiled by all processors beforehand, into Triton's cache on the disk. Rows are printed as
they are found; after --seconds no more are begun.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from codes_bench import FORMATS, Shape, copies, cublas, error, random_codes
from expert_cases import GPT_OSS, QWEN, random_routed
from expert_cases import Shape as ExpertShape
from expert_cases import random_codes as expert_codes
from kernel_timing import BF16, DEVICE, graph_us

from tpctl.kernels.common.codes import Codes, decode
from tpctl.kernels.common.launch import capability, early_launch, num_multiprocessors, shared_memory
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.grouped_scaled import ScaledConfig, pick_scaled, scaled_pairs
from tpctl.kernels.experts.matrices import experts_reference
from tpctl.kernels.experts.placing import place
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.experts.tile_config import TileConfig, pick_block_m
from tpctl.kernels.linear.codes_cublas import cublas_linear, cublas_scales
from tpctl.kernels.linear.codes_gemm import GemmConfig, decoded_linear, gemm_config, quantize_rows, scaled_gemm
from tpctl.kernels.linear.packed_gemm import PackedConfig, packed_gemm, take_apart

LLAMA = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
SHAPES = [Shape.parse(text) for text in (*LLAMA, "5120x2048", "2048x4096")]
ROWS = (64, 128, 256, 272, 512, 4096, 16384)
EXPERT_ROWS = (32, 64, 128, 272, 512, 2048)

BLOCK_TILES = [GemmConfig(*one) for one in (
    (64, 64, 128, 4, 6), (64, 128, 128, 4, 5), (64, 128, 128, 8, 5), (64, 256, 128, 8, 4), (128, 64, 128, 4, 5),
    (128, 128, 128, 8, 4), (256, 64, 128, 8, 4),
)]  # fmt: skip
PACKED_TILES = [PackedConfig(*one) for one in (
    (128, 128, 32, 8, 4), (128, 128, 64, 8, 2), (64, 128, 64, 8, 4), (64, 128, 32, 8, 4), (256, 128, 64, 8, 3),
    (256, 128, 32, 8, 4), (128, 64, 64, 4, 3), (128, 64, 32, 4, 4),
    (64, 128, 64, 8, 4, 4), (256, 128, 64, 8, 3, 2), (256, 128, 64, 8, 3, 4),
)]  # fmt: skip
CODE_TILES = [
    TileConfig(m, *tile)
    for m in (16, 32, 64)
    for tile in ((64, 128, 2, 3), (64, 128, 4, 3), (128, 128, 4, 3), (32, 128, 2, 4), (64, 64, 2, 4))
]
PACKED_ROWS = (64, 128, 176, 219, 256, 384, 512, 1024, 2048, 16384)
UP_TILES = [(128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4)]
DOWN_TILES = [(128, 128, 8, 4), (128, 128, 8, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4)]


class Clock:
    """Whether there is time for more."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self._end


def line(*cells: object) -> None:
    print("  ".join(f"{cell!s:>10}" if i else f"{cell!s:<24}" for i, cell in enumerate(cells)), flush=True)


def tried(call: Callable[[], float], wrong: Callable[[], bool] | None = None) -> str:
    """A figure, or why there is none."""
    try:
        mark = "!" if wrong is not None and wrong() else ""
        return f"{call():.1f}{mark}"
    except Exception as failed:  # what a configuration or a library does not take is told, and the rest goes on
        print(f"  ({type(failed).__name__}: {str(failed).splitlines()[0][:150]})", flush=True)
        return "-"


def ours(x: torch.Tensor, codes: Codes, config: GemmConfig) -> torch.Tensor:
    q, scales = quantize_rows(
        x, "e4m3", None if codes.scales.shape[1] == 1 else config.block_k, pdl=early_launch(len(x), DEVICE)
    )
    return scaled_gemm(
        q, scales, codes, config, out=x.new_empty(len(x), codes.outputs), pdl=early_launch(len(x), DEVICE)
    )


def picked(codes: Codes, rows: int) -> GemmConfig:
    return gemm_config(codes, rows, capability(DEVICE), shared_memory(DEVICE), num_multiprocessors(DEVICE))


def exact(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """With sums in float32 rather than in the tensor cores' own 14 bits, for comparison."""
    q, scales = quantize_rows(x, "e4m3")
    found: torch.Tensor = torch._scaled_mm(
        q, codes.values.T, scales, codes.scales.T, out_dtype=BF16, use_fast_accum=False
    )
    return found


_SCALES: dict[int, Any] = {}
"""By where codes lie; cleared with them, since the next ones may lie there."""


def by_cublas(x: torch.Tensor, codes: Codes, bias: torch.Tensor | None = None) -> torch.Tensor:
    at = codes.values.data_ptr()
    if at not in _SCALES:  # once, as at load: it looks at values
        _SCALES[at] = cublas_scales(codes, capability(DEVICE), torch.version.cuda)
    scales = _SCALES[at]
    assert scales is not None, "cuBLAS takes no such codes"
    return cublas_linear(x, codes, scales, bias, pdl=early_launch(len(x), DEVICE))


def held_weights(name: str, shape: Shape) -> list[Codes]:
    return copies(FORMATS[name], shape)[:8]


def checked(x: torch.Tensor, codes: Codes, call: Callable[[torch.Tensor, Codes], torch.Tensor]) -> Callable[[], bool]:
    """Whether some rows of the result are further off than rounding x explains."""

    def wrong() -> bool:
        some, rows = slice(0, len(x), max(1, len(x) // 48)), slice(0, 2048)
        want = x[some].float() @ decode(codes, 0, 2048).float().T
        return not error(call(x, codes)[some, rows], want) < 0.05

    return wrong


def dense(args: argparse.Namespace, clock: Clock) -> None:
    line("FP8, us", "rows", "bf16", "round", "ours", "cuBLAS", "exact", "| blocks", "best", "cuBLAS", "tile")
    for shape in args.only or SHAPES:
        _SCALES.clear()
        channel, blocks = (held_weights(name, shape) for name in ("fp8 channel", "fp8 block"))
        for rows in args.rows or ROWS:
            if clock.over():
                return
            x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
            few = 3 if rows > 512 else 8

            def time_of(
                call: Callable[[torch.Tensor, Codes], torch.Tensor],
                held: Sequence[Codes],
                x: torch.Tensor = x,
                few: int = few,
            ) -> str:
                return tried(lambda: in_few(partial(call, x), held[:few]), checked(x, held[0], call))

            tiles = {
                config: time_of(partial(ours, config=config), blocks)
                for config in (BLOCK_TILES if rows <= 512 else BLOCK_TILES[1:-1])
            }
            right = [one for one in tiles if tiles[one][-1].isdigit()]
            best = min(right or tiles, key=lambda one: float(tiles[one].strip("!-") or "inf"))
            line(
                shape,
                rows,
                f"{cublas(rows, shape):.1f}",
                tried(partial(again, partial(quantize_rows, kind="e4m3", pdl=early_launch(rows, DEVICE)), x)),
                time_of(partial(ours, config=picked(channel[0], rows)), channel),
                time_of(by_cublas, channel),
                time_of(exact, channel),
                time_of(partial(ours, config=picked(blocks[0], rows)), blocks),
                tiles[best],
                time_of(by_cublas, blocks),
                tuple(best[:2]) + tuple(best[3:5]),
            )


def in_few(call: Callable[[Codes], object], held: Sequence[Codes]) -> float:
    for codes in held:
        call(codes)
    return graph_us([partial(call, codes) for codes in held], 3)


def again(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    return graph_us([partial(call, x)] * 8)


def odd_cases() -> None:
    """What cuBLAS is to take beside what models of the table have: rows of any number, biases, one scale in all."""
    for rows in (97, 301, 1003):
        x = torch.randn(rows, 4096, device=DEVICE, dtype=BF16)
        for name in ("fp8 channel", "fp8 block"):
            codes = random_codes(FORMATS[name], Shape(1024, 4096))
            _SCALES.clear()
            bias = torch.randn(1024, device=DEVICE, dtype=BF16)
            want = x.float() @ decode(codes).float().T
            found = []
            for added in (None, bias):
                try:
                    wanted = want if added is None else want + added.float()
                    found.append(f"{error(by_cublas(x, codes, added), wanted):.1e}")
                except RuntimeError as failed:
                    found.append(str(failed).splitlines()[0][:120])
            print(f"{name}, {rows} rows, error without and with a bias: {', '.join(found)}", flush=True)


def int4(args: argparse.Namespace, clock: Clock) -> None:
    line("int4, us", "rows", "bf16", "decoded", "apart", "| packed, each", *(tuple(one) for one in PACKED_TILES))
    for shape in args.only or SHAPES[:4]:
        held = held_weights("gptq", shape)
        for rows in args.rows or ROWS:
            if clock.over():
                return
            x = torch.randn(rows, shape.inputs, device=DEVICE, dtype=BF16)
            few = held[: 3 if rows > 512 else 8]
            line(
                shape,
                rows,
                f"{cublas(rows, shape):.1f}",
                tried(partial(in_few, partial(decoded_linear, x), few)),
                tried(partial(again, partial(take_apart, pdl=early_launch(rows, DEVICE)), x)),
                *(
                    tried(partial(in_few, partial(call, x), few), checked(x, held[0], call))
                    for call in [partial(packed, one) for one in PACKED_TILES]
                ),
            )


def packed(config: PackedConfig, x: torch.Tensor, codes: Codes) -> torch.Tensor:
    return packed_gemm(x, codes, config, pdl=early_launch(len(x), DEVICE))


def expert_layers() -> list[CodedExperts]:
    """Two of Qwen3-30B-A3B's: 1.2 GB."""

    def matrix(n: int, k: int) -> CodedMatrix:
        codes = expert_codes("e4m3", QWEN.count, n, k, 128, False)
        return CodedMatrix(Codes(**{**vars(codes), "rounds": True}))

    return [
        CodedExperts(matrix(2 * QWEN.width, QWEN.hidden), matrix(QWEN.hidden, QWEN.width), activation="silu")
        for _ in range(2)
    ]


def experts(args: argparse.Namespace, clock: Clock) -> None:
    line("experts in blocks, us", "rows", "placing", "as codes", "picked", "best up", "best down", "error", "tiles")
    layers = expert_layers()
    for rows in args.rows or EXPERT_ROWS:
        made = [(random_routed(QWEN, rows), layers[i % 2]) for i in range(6)]
        pairs, pdl = rows * QWEN.per_token, early_launch(rows, DEVICE)
        suited = pick_block_m(pairs, QWEN.count)
        chosen = pick_scaled(pairs, layers[0], QWEN.count, suited, capability(DEVICE), shared_memory(DEVICE))
        assert chosen is not None
        best: dict[str, tuple[float, Any]] = {}
        for block_m in dict.fromkeys((max(16, suited // 4), max(16, suited // 2), suited)):
            if clock.over():
                return
            placed = [place(one.ids, QWEN.count, block_m) for one, _ in made]
            base = chosen[0]._replace(block_m=block_m), chosen[1]._replace(block_m=block_m)
            for which, tiles in (("up", UP_TILES), ("down", DOWN_TILES)):
                for tile in tiles:
                    config = ScaledConfig(block_m, *tile)
                    pair = (config, base[1]) if which == "up" else (base[0], config)
                    us = timed_experts(made, placed, pair, pdl)
                    if us is not None and us < best.get(which, (1e9, None))[0]:
                        best[which] = us, tuple(config)
        placed = [place(one.ids, QWEN.count, chosen[0].block_m) for one, _ in made]
        us = timed_experts(made, placed, chosen, pdl)
        codes_us = graph_us([partial(e.pairs_in_tiles, r, e.tiles(r, QWEN.count), pdl=pdl) for r, e in made], 3)
        place_us = graph_us([partial(place, r.ids, QWEN.count, suited, pdl=pdl) for r, _ in made], 3)
        routed, one = made[0]
        y = scaled_pairs(routed, one, placed[0], chosen, pdl=False)
        want = experts_reference(routed.x, routed.ids, routed.weights, one, torch.float32)
        off = error(y.view(rows, -1, QWEN.hidden).float().sum(1), want)
        line(
            "quantise, gate_up, down",
            rows,
            f"{place_us:.1f}",
            f"{codes_us:.1f}",
            "-" if us is None else f"{us:.1f}",
            *(f"{best[which][0]:.1f}" if which in best else "-" for which in ("up", "down")),
            f"{off:.1e}",
            f"{tuple(chosen[0])} {tuple(chosen[1])}; best {best.get('up')} {best.get('down')}",
        )


def packed_layers(shape: ExpertShape, count: int) -> CodedExperts:
    """Of so many experts."""

    def matrix(n: int, k: int) -> CodedMatrix:
        if shape is GPT_OSS:
            return CodedMatrix(expert_codes("e2m1", count, n, k, 32, True))
        return CodedMatrix(expert_codes("uint4", count, n, k, 128, False))

    def bias(n: int) -> torch.Tensor | None:
        return torch.randn(count, n, device=DEVICE, dtype=BF16) if shape.interleaved else None

    up, down = matrix(2 * shape.width, shape.hidden), matrix(shape.hidden, shape.width)
    biases = bias(2 * shape.width), bias(shape.hidden)
    return CodedExperts(up, down, *biases, shape.activation, shape.interleaved)


def apart(e: CodedExperts, r: Routed, config: TileConfig) -> tuple[Callable[[], object], ...]:
    """gate_up and down, with tiles of one configuration."""
    placed = place(r.ids, e.count, config.block_m)
    h = torch.randn(r.ids.numel(), e.width, device=DEVICE, dtype=BF16)
    return partial(e.gate_up_pairs, r, placed, config), partial(e.down_pairs, h, r, placed, config)


def packed_experts(args: argparse.Namespace, clock: Clock) -> None:
    for shape in (GPT_OSS, QWEN):
        layers = [packed_layers(shape, shape.count) for _ in range(2)]
        line(f"{shape.name} in 4 bits, us", "rows", "picked", "decoded", "error", "best of gate_up; of down")
        for rows in args.rows or PACKED_ROWS:
            if clock.over():
                return
            made = [(random_routed(shape, rows), layers[i % 2]) for i in range(6 if rows <= 512 else 2)]
            as_codes: list[Callable[[], object]] = [
                partial(e.pairs_in_tiles, r, e.tiles(r, shape.count)) for r, e in made
            ]
            decoded: list[Callable[[], object]] = [partial(e.decoded().grouped_pairs, r, shape.count) for r, e in made]
            found: dict[TileConfig, list[float]] = {}
            for config in CODE_TILES if rows <= 2048 else []:
                both = list(zip(*(apart(e, r, config) for r, e in made), strict=True))
                try:
                    found[config] = [graph_us(list(calls), 3) for calls in both]
                except Exception as failed:
                    print(f"  ({config}: {type(failed).__name__}: {str(failed)[:100]})", flush=True)
            routed, one = made[0]
            y = one.decoded().grouped_pairs(routed, shape.count)[: 8 * shape.per_token]
            few = Routed(routed.x[:8], routed.ids[:8], routed.weights[:8])
            want = experts_reference(few.x, few.ids, few.weights, one, torch.float32)
            best = [sorted((us[which], tuple(config)) for config, us in found.items())[:4] for which in (0, 1)]
            line(
                "gate_up and down",
                rows,
                tried(partial(graph_us, as_codes, 3)),
                tried(partial(graph_us, decoded, 3)),
                f"{error(y.view(8, -1, shape.hidden).float().sum(1), want):.1e}",
                "; ".join(" ".join(f"{us:.0f} {config}" for us, config in some) for some in best),
            )
        del layers


def timed_experts(
    made: Sequence[Any], placed: Sequence[Any], configs: tuple[ScaledConfig, ScaledConfig], pdl: bool
) -> float | None:
    try:
        calls: list[Callable[[], object]] = [
            partial(scaled_pairs, r, e, p, configs, pdl=pdl) for (r, e), p in zip(made, placed, strict=True)
        ]
        return graph_us(calls, 3)
    except Exception as failed:
        print(f"  ({configs}: {type(failed).__name__}: {str(failed)[:100]})", flush=True)
        return None


def compile_dense(job: tuple[str, int, GemmConfig]) -> None:
    """In a process of its own: what it leaves is on the disk."""
    name, inputs, config = job
    codes = random_codes(FORMATS[name], Shape(512, inputs))
    for rows in (512, 528):
        x = torch.zeros(rows, inputs, device=DEVICE, dtype=BF16)
        ours(x, codes, config)


def compile_packed(job: tuple[int, PackedConfig]) -> None:
    inputs, config = job
    codes = random_codes(FORMATS["gptq"], Shape(512, inputs))
    for rows in (512, 528):
        packed(config, torch.zeros(rows, inputs, device=DEVICE, dtype=BF16), codes)


def compile_experts(job: tuple[ScaledConfig, ScaledConfig]) -> None:
    up, down = (
        CodedMatrix(Codes(**{**vars(expert_codes("e4m3", 2, n, k, 128, False)), "rounds": True}))
        for n, k in ((2 * QWEN.width, QWEN.hidden), (QWEN.hidden, QWEN.width))
    )
    for rows in (512, 528):
        ids = torch.zeros(rows, QWEN.per_token, dtype=torch.int32, device=DEVICE)
        x = torch.zeros(rows, QWEN.hidden, device=DEVICE, dtype=BF16)
        routed = random_routed(QWEN, 1)._replace(x=x, ids=ids, weights=ids.float())
        placed = place(ids, 2, job[0].block_m)
        scaled_pairs(routed, CodedExperts(up, down, activation="silu"), placed, job, pdl=early_launch(rows, DEVICE))


def compile_packed_experts(job: tuple[ExpertShape, TileConfig]) -> None:
    shape, config = job
    made = packed_layers(shape, 16)
    for rows in (128, 512):
        ids = torch.zeros(rows, shape.per_token, dtype=torch.int32, device=DEVICE)
        routed = Routed(torch.zeros(rows, shape.hidden, device=DEVICE, dtype=BF16), ids, ids.float())
        for call in apart(made, routed, config):
            call()


def compiled(sections: Iterable[str]) -> list[tuple[Callable[[Any], None], Any]]:
    """What is to be compiled: of the two kinds of launches, early ones and not, in one job."""
    jobs: list[tuple[Callable[[Any], None], Any]] = []
    if "dense" in sections:
        for inputs in (4096, 14336, 2048):
            jobs += [(compile_dense, ("fp8 block", inputs, config)) for config in BLOCK_TILES]
            jobs += [(compile_dense, ("fp8 channel", inputs, config)) for config in BLOCK_TILES[:2] + BLOCK_TILES[5:6]]
    if "int4" in sections:
        jobs += [(compile_packed, (inputs, config)) for inputs in (4096, 14336) for config in PACKED_TILES]
    if "packed" in sections:
        jobs += [(compile_packed_experts, (shape, config)) for shape in (GPT_OSS, QWEN) for config in CODE_TILES]
    if "experts" in sections:
        heights = {16, 32, 64, 128}
        for block_m in heights:
            for i in range(max(len(UP_TILES), len(DOWN_TILES))):
                pair = (
                    ScaledConfig(block_m, *UP_TILES[i % len(UP_TILES)]),
                    ScaledConfig(block_m, *DOWN_TILES[i % len(DOWN_TILES)]),
                )
                jobs.append((compile_experts, pair))
    return jobs


def run_job(job: tuple[Callable[[Any], None], Any]) -> None:
    try:
        job[0](job[1])
    except Exception as failed:
        print(f"  ({job[1]}: {type(failed).__name__}: {str(failed)[:100]})", flush=True)


SECTIONS = {"experts": experts, "packed": packed_experts, "dense": dense, "int4": int4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rows", nargs="+", type=int, default=[])
    parser.add_argument("--only", nargs="+", type=Shape.parse, default=[])
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    sections = args.sections or list(SECTIONS)
    clock = Clock(args.seconds)
    torch.manual_seed(0)
    jobs = compiled(sections)
    started = time.monotonic()
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(run_job, jobs))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(jobs)} jobs compiled in "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    if "dense" in sections:
        odd_cases()
    for name in SECTIONS:
        if name in sections:
            SECTIONS[name](args, clock)


if __name__ == "__main__":
    main()
