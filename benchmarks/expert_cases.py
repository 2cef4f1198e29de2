"""Experts of published models with random weights, their floors, and plain torch beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernel_timing import BF16, DEVICE, graph_us

from tpctl.arch.block import Activation, Clamped
from tpctl.arch.routing import Routing
from tpctl.kernels.common.codes import Codes, Kind
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.gating import gated_reference
from tpctl.kernels.experts.matrices import ExpertMatrices, experts_reference
from tpctl.kernels.experts.one_row import one_row
from tpctl.kernels.experts.routing import GateScratch, Routed, Router, gate, route

SHARED_MEMORY = 232448
RATE = 990e6  # bfloat16 operations a microsecond
CALLS = 12


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


def random_layers(shape: Shape) -> list[ExpertMatrices[Any]]:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=BF16).mul_(size[-1] ** -0.5)

    count, hidden, width = shape.count, shape.hidden, shape.width
    biases = shape.interleaved
    return [
        ExpertMatrices(
            DenseMatrix(random(count, 2 * width, hidden)),
            DenseMatrix(random(count, hidden, width)),
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
    experts: ExpertMatrices[Any]
    norm: tuple[torch.Tensor, float]

    def call(self, **options: Any) -> torch.Tensor:
        return one_row(*self[:4], norm=self.norm, **options)

    @property
    def routed(self) -> Routed:
        return gate(*self[:3], norm=self.norm)


def alone(shape: Shape, layers: Sequence[ExpertMatrices[Any]], calls: int = CALLS) -> list[Alone]:
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


def torch_loop(routed: Routed, experts: ExpertMatrices[Any]) -> Callable[[], torch.Tensor]:
    """A loop over the chosen experts, whose tokens are known: no host in between, so that it can be captured."""
    gate_up, down = experts.gate_up.values, experts.down.values
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


def error_of(call: Callable[[], torch.Tensor], routed: Routed, experts: ExpertMatrices[Any]) -> str:
    want = experts_reference(routed.x, routed.ids, routed.weights, experts, torch.float32)
    error = float((call().float() - want).norm() / want.norm())
    return f"{error:.1e}" if error < 1e-2 else f"WRONG {error:.1e}"


def cases(layers: Sequence[ExpertMatrices[Any]], shape: Shape, rows: int) -> list[tuple[Routed, ExpertMatrices[Any]]]:
    calls = CALLS if rows <= 512 else 3
    return [(random_routed(shape, rows), layers[i % len(layers)]) for i in range(calls)]
