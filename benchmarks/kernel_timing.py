"""How the benchmarks of kernels time, print and make what they time: shapes of models, weights, caches."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

if find_spec("triton") is None:
    raise SystemExit("this times Triton kernels: it needs the package triton and a CUDA GPU")

BF16 = torch.bfloat16
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Shape:
    """One rank's part of a model."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    qk_norm: bool
    head_dim: int = 128

    def half(self) -> Shape:
        return replace(
            self,
            name=self.name + " tp2",
            heads=self.heads // 2,
            kv_heads=self.kv_heads // 2,
            intermediate=self.intermediate // 2,
            vocab=self.vocab // 2,
        )

    def linears(self) -> list[tuple[str, int, int, bool]]:
        """(name, output features, input features, gated) of a layer's linears and the lm_head."""
        return [
            ("qkv", (self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden, False),
            ("o", self.hidden, self.heads * self.head_dim, False),
            ("gate_up", self.intermediate, self.hidden, True),
            ("down", self.hidden, self.intermediate, False),
            ("lm_head", self.vocab, self.hidden, False),
        ]


QWEN = Shape("qwen3-0.6b", 28, 1024, 16, 8, 3072, 151936, True)
LLAMA = Shape("llama-8b", 32, 4096, 32, 8, 14336, 128256, False)


def graph_us(calls: list[Callable[[], object]], repeats: int = 5) -> float:
    """Median microseconds of one call, the calls replayed in turn from one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    # The same count on every rank of a collective, whatever each has measured.
    inner = 10 if "LOCAL_RANK" in os.environ else max(1, min(50, int(5 / max(start.elapsed_time(stop), 1e-3))))
    times: list[float] = []
    for _ in range(repeats):
        start.record()
        for _ in range(inner):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / inner / len(calls))
    return sorted(times)[repeats // 2]


def random_weights(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, device=DEVICE, dtype=BF16) * 0.02 for _ in range(count)]


def row(*cells: object) -> None:
    print("  ".join(f"{cell:>12}" if i else f"{cell:<40}" for i, cell in enumerate(cells)), flush=True)


KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [num_blocks, B, K, D]."""


def make_cache(
    lens: list[int], shape: Shape, block_size: int, layers: int
) -> tuple[KV, list[torch.Tensor], torch.Tensor]:
    """Caches that hold `layers` batches of these lengths, a shuffled block table for each, and the lengths."""
    counts = [-(-length // block_size) for length in lens]
    total = sum(counts)
    blocks = torch.randperm(total * layers).int()
    tables = []
    for layer in range(layers):
        table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
        start = layer * total
        for i, count in enumerate(counts):
            table[i, :count] = blocks[start : start + count]
            start += count
        tables.append(table.to(DEVICE))
    size = (total * layers, block_size, shape.kv_heads, shape.head_dim)
    keys, values = (torch.randn(size, device=DEVICE, dtype=BF16) for _ in range(2))
    return (keys, values), tables, torch.tensor(lens, dtype=torch.int32, device=DEVICE)


def mixed_lengths(count: int, low: int, high: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randint(low, high) for _ in range(count)]
