"""Times tpctl's kernels for mixtures of experts on one GPU, beside their floors and plain torch.

    python benchmarks/expert_bench.py [route] [one] [rows] [codes] [step] [sweep]

Every figure is the median of several replays of a CUDA graph whose calls choose other experts of several layers, so
that weights come from memory. A floor is the larger of the bytes that must be read over the bandwidth that a large copy
reaches here, and the operations over 990 TFLOP/s. `error`: of the result, beside float32 by the same numbers. One row
counts norm, router and choice. Torch is a loop over the experts that were chosen, known beforehand.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from kernel_bench import BF16, DEVICE, graph_us, row

from tpctl.arch.block import Activation, Clamped
from tpctl.arch.routing import Routing
from tpctl.kernels.common.codes import Codes, Kind
from tpctl.kernels.common.launch import num_multiprocessors
from tpctl.kernels.experts.gating import gated_reference
from tpctl.kernels.experts.grouped import (
    UNLISTED_ROWS,
    TileConfig,
    grouped,
    grouped_down,
    grouped_gate_up,
    pick_block_m,
    pick_tile,
)
from tpctl.kernels.experts.grouped_scaled import LEAST_PAIRS
from tpctl.kernels.experts.matrices import ExpertMatrices, experts_reference
from tpctl.kernels.experts.one_row import RowConfig, one_row, pick_row
from tpctl.kernels.experts.placing import place
from tpctl.kernels.experts.routing import GATE_ROWS, GateScratch, Routed, Router, gate, route
from tpctl.kernels.linear.codes_gemm import is_scaled

SHARED_MEMORY = 232448
RATE = 990e6  # bfloat16 operations a microsecond
CALLS = 12
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)


@dataclass(frozen=True)
class Shape:
    """One layer's experts of a model."""

    name: str
    hidden: int
    width: int
    count: int
    per_token: int
    routing: Routing
    activation: Activation | Clamped = "silu"
    layers: int = 2

    @property
    def interleaved(self) -> bool:
        return isinstance(self.activation, Clamped)

    def bytes(self, experts: int, bits: float = 16) -> float:
        """Of the weights of so many experts."""
        return experts * 3 * self.hidden * self.width * bits / 8


QWEN = Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, Routing("softmax", True))
GPT_OSS = Shape("gpt-oss-20b", 2880, 2880, 32, 4, Routing("softmax of chosen"), Clamped(1.702, 7.0))
GLM = Shape("GLM-4.5-Air", 4096, 1408, 128, 8, Routing("sigmoid", True, scale=1.0, epsilon=1e-20))
MIXTRAL = Shape("Mixtral-8x7B", 4096, 14336, 8, 2, Routing("softmax", True))
SHAPES = (QWEN, GPT_OSS, GLM, MIXTRAL)


@cache
def bandwidth() -> float:
    """Bytes a microsecond that a copy of 4 GB reads and writes."""
    data = torch.empty(1 << 32, dtype=torch.uint8, device=DEVICE).random_()
    copy = torch.empty_like(data)
    return 2 * data.nbytes / graph_us([partial(copy.copy_, data)])


def random_layers(shape: Shape) -> list[ExpertMatrices]:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=BF16).mul_(size[-1] ** -0.5)

    count, hidden, width = shape.count, shape.hidden, shape.width
    biases = shape.interleaved
    return [
        ExpertMatrices(
            random(count, 2 * width, hidden),
            random(count, hidden, width),
            random(count, 2 * width) if biases else None,
            random(count, hidden) if biases else None,
            shape.activation,
            shape.interleaved,
        )
        for _ in range(shape.layers)
    ]


def random_codes(kind: Kind, count: int, n: int, k: int, unit: int | None, exponents: bool) -> Codes:
    """As published formats have them: e4m3 in blocks of 128 x 128, else a scale for each row and ``unit`` inputs."""
    packed, block = kind in ("uint4", "e2m1"), kind == "e4m3" and unit is not None
    values = torch.randint(0, 120, (count, n, k // 2 if packed else k), device=DEVICE, dtype=torch.uint8)
    rows = torch.arange(n, device=DEVICE, dtype=torch.int32) // 128 if block else None
    grid = (count, -(-n // 128) if block else n, 1 if unit is None else -(-k // unit))
    scales = torch.full(grid, 118, device=DEVICE, dtype=torch.uint8) if exponents else torch.rand(grid, device=DEVICE)
    if not exponents:
        scales *= 0.02 if packed else 0.0005
    typed = values.view(torch.float8_e4m3fn if kind == "e4m3" else torch.int8) if not packed else values
    return Codes(kind, k, typed, scales, rows=rows, unit=unit or k, zero=8 if kind == "uint4" else 0)


def random_routed(shape: Shape, rows: int) -> Routed:
    x = torch.randn(rows, shape.hidden, device=DEVICE, dtype=BF16)
    ids, weights = route(torch.randn(rows, shape.count, device=DEVICE), shape.routing, shape.per_token)
    return Routed(x, ids, weights)


class Alone(NamedTuple):
    """What `one_row` takes of one call, and its norm."""

    x: torch.Tensor
    router: Router
    scratch: GateScratch
    experts: ExpertMatrices
    norm: tuple[torch.Tensor, float]

    def call(self, **options: Any) -> torch.Tensor:
        return one_row(*self[:4], norm=self.norm, **options)

    @property
    def routed(self) -> Routed:
        return gate(*self[:3], norm=self.norm)


def alone(shape: Shape, layers: list[ExpertMatrices], calls: int = CALLS) -> list[Alone]:
    scratch = GateScratch.allocate(DEVICE)
    norm = (torch.ones(shape.hidden, device=DEVICE, dtype=BF16), 1e-6)
    return [
        Alone(torch.randn(1, shape.hidden, device=DEVICE, dtype=BF16), random_router(shape), scratch,
              layers[i % len(layers)], norm)
        for i in range(calls)
    ]  # fmt: skip


def random_router(shape: Shape) -> Router:
    weight = torch.randn(shape.count, shape.hidden, device=DEVICE, dtype=BF16) / 50
    return Router(weight, shape.routing, shape.per_token)


def floor_us(shape: Shape, routed: Routed, bits: float = 16) -> float:
    """Of the two linears of all that was chosen."""
    used = len(torch.unique(routed.ids))
    operations = routed.ids.numel() * 6 * shape.hidden * shape.width
    return max(shape.bytes(used, bits) / bandwidth(), operations / RATE)


def torch_loop(routed: Routed, experts: ExpertMatrices) -> Callable[[], torch.Tensor]:
    """A loop over the chosen experts, whose tokens are known: no host in between, so that it can be captured."""
    assert isinstance(experts.gate_up, torch.Tensor) and isinstance(experts.down, torch.Tensor)
    gate_up, down = experts.gate_up, experts.down
    chosen = [(e, *torch.where(routed.ids == e)) for e in torch.unique(routed.ids).tolist()]

    def run() -> torch.Tensor:
        total = torch.zeros_like(routed.x)
        for expert, tokens, slots in chosen:
            y = F.linear(routed.x[tokens], gate_up[expert])
            first, second = (y[:, ::2], y[:, 1::2]) if experts.interleaved else y.chunk(2, -1)
            y = F.linear(gated_reference(first, second, experts.activation), down[expert])
            total.index_add_(0, tokens, y * routed.weights[tokens, slots, None].to(y.dtype))
        return total

    return run


def error_of(call: Callable[[], torch.Tensor], routed: Routed, experts: ExpertMatrices) -> str:
    want = experts_reference(routed.x, routed.ids, routed.weights, experts, torch.float32)
    error = float((call().float() - want).norm() / want.norm())
    return f"{error:.1e}" if error < 1e-2 else f"WRONG {error:.1e}"


def cases(layers: list[ExpertMatrices], shape: Shape, rows: int) -> list[tuple[Routed, ExpertMatrices]]:
    calls = CALLS if rows <= 512 else 3
    return [(random_routed(shape, rows), layers[i % len(layers)]) for i in range(calls)]


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
            up = graph_us([partial(grouped_gate_up, r, e, p, first) for (r, e), p in zip(made, placed, strict=True)])
            h = torch.randn(rows * shape.per_token, shape.width, device=DEVICE, dtype=BF16)
            down = graph_us([partial(grouped_down, h, r, e, p, second) for (r, e), p in zip(made, placed, strict=True)])
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
                ExpertMatrices(
                    random_codes(kind, count, 2 * width, hidden, unit, exponents),
                    random_codes(kind, count, hidden, width, unit, exponents),
                    one.gate_up_bias,
                    one.down_bias,
                    shape.activation,
                    shape.interleaved,
                )
                for one in plain
            ]
            for rows in (1, 8, 64, 512, 1024, 8192):
                us, routed, call = timed(coded, shape, rows, by_row=bits == 8)
                dense, _, _ = timed(plain, shape, rows, by_row=True)
                floor = floor_us(shape, routed, bits)
                row(f"{shape.name} {name}", rows, f"{us:.1f}", f"{floor:.1f}", f"{floor / us:.0%}", f"{dense:.1f}",
                    error_of(call, routed, coded[0]), *in_8_bits(coded, shape, rows))  # fmt: skip


def in_8_bits(layers: list[ExpertMatrices], shape: Shape, rows: int) -> tuple[str, str]:
    """Microseconds and error where x is rounded to the weights' 8 bits, if so many rows would be."""
    rounding = []
    for one in layers:
        assert isinstance(one.gate_up, Codes) and isinstance(one.down, Codes)
        gate_up, down = replace(one.gate_up, rounds=True), replace(one.down, rounds=True)
        enough = rows * shape.per_token >= LEAST_PAIRS * shape.count
        if not (enough and is_scaled(gate_up, (9, 0)) and is_scaled(down, (9, 0))):
            return "", ""
        rounding.append(replace(one, gate_up=gate_up, down=down))
    us, routed, call = timed(rounding, shape, rows, by_row=False)
    return f"{us:.1f}", error_of(call, routed, rounding[0])


def timed(
    layers: list[ExpertMatrices], shape: Shape, rows: int, *, by_row: bool
) -> tuple[float, Routed, Callable[[], torch.Tensor]]:
    """Microseconds, and what the first call was of. by_row: one row goes through `one_row`, as in `CudaExperts`."""
    if rows == 1 and by_row:
        single = alone(shape, layers)
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


def row_sweeps(shape: Shape, layers: list[ExpertMatrices]) -> Iterator[Sweep]:
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


def tile_sweeps(shape: Shape, layers: list[ExpertMatrices], rows: int) -> Iterator[Sweep]:
    made = cases(layers, shape, rows)[:6]
    sizes = (16,) if rows <= UNLISTED_ROWS else (16, 32, 64) if rows <= 512 else (64, 128, 256)
    h = torch.randn(rows * shape.per_token, shape.width, device=DEVICE, dtype=BF16)
    for block_m in sizes:
        placed: list[Any] = [place(r.ids, shape.count, block_m) if rows > UNLISTED_ROWS else None for r, _ in made]

        def up(config: TileConfig, placed: Any = placed) -> float:
            return graph_us([partial(grouped_gate_up, r, e, p, config) for (r, e), p in zip(made, placed, strict=True)])

        def down(config: TileConfig, placed: Any = placed) -> float:
            return graph_us([partial(grouped_down, h, r, e, p, config) for (r, e), p in zip(made, placed, strict=True)])

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
