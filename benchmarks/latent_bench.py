"""Latent attention's kernels at DeepSeek's sizes: checked against their references, then timed beside what memory or
the tensor cores would take.

    PYTHONPATH=. python benchmarks/latent_bench.py [check] [decode] [around] [prompts] [sweep]

Without names all but the last. ``sweep`` times decodes with other tiles and warps.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_timing import BF16, DEVICE, graph_us, random_weights, row

from tpctl.kernels.attention.latent_decode import (
    LatentConfig,
    LatentPlan,
    LatentScratch,
    latent_attention_reference,
    latent_decode,
)
from tpctl.kernels.attention.latent_plain import latent_plain
from tpctl.kernels.attention.latent_prefill import latent_prefill
from tpctl.kernels.attention.latent_prepare import LatentShape, latent_prepare
from tpctl.kernels.attention.latent_values import latent_values
from tpctl.kernels.common.launch import num_multiprocessors

SHAPE = LatentShape(512, 128, 64, 128)
KEPT, BLOCK, LAYERS = 576, 128, 8
BANDWIDTH, FLOPS = 4.8e12, 990e12
"""An H200's, bytes and bfloat16 products and sums a second."""
CASES = [([128], 16), ([1100], 16), ([8000], 16), ([1100] * 8, 16), ([1100] * 32, 16), ([12000] * 32, 16)]
CASES += [([1100] * 128, 16), ([1100], 128), ([12000] * 32, 128)]


class Cached:
    """Layers of random caches that hold sequences of these lengths, in shuffled blocks, and queries for them."""

    def __init__(self, lens: list[int], heads: int, layers: int = LAYERS, tokens: int = 1) -> None:
        self.lens, self.heads = lens, heads
        counts = [-(-length // BLOCK) for length in lens]
        self.caches = [torch.randn(sum(counts), BLOCK, KEPT, device=DEVICE, dtype=BF16) for _ in range(layers)]
        order = torch.randperm(sum(counts), device=DEVICE).int()
        self.tables = torch.zeros(len(lens), max(counts), dtype=torch.int32, device=DEVICE)
        for index, (count, first) in enumerate(zip(counts, itertools.accumulate(counts, initial=0), strict=False)):
            self.tables[index, :count] = order[first : first + count]
        self.lens_S = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(tokens * len(lens), heads, KEPT, device=DEVICE, dtype=BF16) * 0.1
        self.scratch = LatentScratch.allocate(heads, 512, DEVICE)

    def decodes(self, config: LatentConfig | None = None) -> list[Callable[[], object]]:
        more: dict[str, Any] = {
            "block_tables": self.tables,
            "seq_lens_S": self.lens_S,
            "plan": self.plan(config),
            "scale": 0.07,
        }
        return [partial(latent_decode, self.q, cache, **more, pdl=True) for cache in self.caches]

    def plan(self, config: LatentConfig | None = None) -> LatentPlan:
        plan = LatentPlan(len(self.lens), self.heads, 512, 64, BLOCK, self.scratch, config=config)
        plan.update(self.lens_S)
        return plan

    @property
    def floor_us(self) -> float:
        return 1e6 * max(
            sum(self.lens) * KEPT * 2 / BANDWIDTH, sum(self.lens) * self.heads * 2 * (KEPT + SHAPE.rank) / FLOPS
        )


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check() -> None:
    row("check", "heads", "error")
    for lens, heads in (([1], 1), ([1100, 127, 128, 129, 1], 16), ([700] * 20, 3), ([3000, 5], 128)):
        made = Cached(lens, heads, 1)
        want = latent_attention_reference(made.q, made.caches[0], made.tables, [1] * len(lens), lens, 512, scale=0.07)
        plan = made.plan()
        got = latent_decode(made.q, made.caches[0], made.tables, made.lens_S, plan, scale=0.07, pdl=True)
        row("decode", heads, f"{error(got, want):.1e}")
    for new, lens in (([300, 1], [300, 900]), ([64, 64, 2048], [64, 1000, 2048])):
        made = Cached(lens, 16, 1)
        q = torch.randn(sum(new), 16, KEPT, device=DEVICE, dtype=BF16) * 0.1
        starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32, device=DEVICE)
        got = latent_prefill(q, made.caches[0], made.tables, starts, made.lens_S, 512, scale=0.07)
        want = latent_attention_reference(q, made.caches[0], made.tables, new, lens, 512, scale=0.07)
        row("prompts, absorbed", 16, f"{error(got, want):.1e}")


def decode() -> None:
    row("decode", "sequences", "tokens", "heads", "us", "floor us")
    for lens, heads in CASES:
        made = Cached(lens, heads)
        row("", len(lens), lens[0], heads, f"{graph_us(made.decodes()):.1f}", f"{made.floor_us:.1f}")
        del made


def around() -> None:
    row("before and after", "rows", "heads", "prepare us", "values us", "floor us of each")
    for rows, heads in itertools.product((1, 8, 16, 32, 256, 4096), (16, 128)):
        weights = random_weights(LAYERS, heads * 256, 512)
        q, kept = (torch.randn(rows, width, device=DEVICE, dtype=BF16) for width in (heads * 192, KEPT))
        cache = torch.zeros(rows // BLOCK + 1, BLOCK, KEPT, device=DEVICE, dtype=BF16)
        norm, angles = (torch.ones(512, device=DEVICE, dtype=BF16), 1e-6), (torch.rand(64, 32, device=DEVICE),) * 2
        at = torch.arange(rows, device=DEVICE)
        prepare = partial(latent_prepare, q, kept, cache=cache, norm=norm, cos_sin=angles, shape=SHAPE, pdl=True,
                          interleaved=True, positions_T=at % 64, slot_mapping_T=at)  # fmt: skip
        sums = torch.randn(rows, heads, 512, device=DEVICE, dtype=BF16)
        calls: list[Callable[[], object]] = [partial(prepare, kv_b=one) for one in weights]
        after: list[Callable[[], object]] = [partial(latent_values, sums, one, SHAPE, pdl=True) for one in weights]
        floor = 1e6 * max(heads * 128 * 512 * 2 / BANDWIDTH, rows * heads * 2 * 128 * 512 / FLOPS)
        row("", rows, heads, f"{graph_us(calls):.1f}", f"{graph_us(after):.1f}", f"{floor:.1f}")


def prompts() -> None:
    row("prompts of 16 heads", "new", "tokens", "absorbed us", "plain us", "floor us of each")
    for new, length in ((512, 512), (2048, 2048), (8192, 8192), (256, 8192), (2048, 8192)):
        made = Cached([length], 16, 1)
        q = torch.randn(new, 16, KEPT, device=DEVICE, dtype=BF16) * 0.1
        starts, keys = (torch.tensor([0, end], dtype=torch.int32, device=DEVICE) for end in (new, length))
        absorbed = partial(latent_prefill, q, made.caches[0], made.tables, starts, made.lens_S, 512, scale=0.07)
        q_TND, rotated = q[..., :192], torch.randn(new, 16, 64, device=DEVICE, dtype=BF16)
        (weight,), out = random_weights(1, 16 * 256, 512), torch.empty(new, 16, 128, device=DEVICE, dtype=BF16)
        read = made.caches[0].view(-1, KEPT)[:length]

        def plain(
            read: torch.Tensor = read,
            weight: torch.Tensor = weight,
            q: torch.Tensor = q_TND.contiguous(),
            rotated: torch.Tensor = rotated,
            starts: torch.Tensor = starts,
            keys: torch.Tensor = keys,
            out: torch.Tensor = out,
        ) -> None:
            latent_plain(q, rotated, read[:, :512] @ weight.t(), read[:, 512:], starts, keys, SHAPE, out, scale=0.07)

        pairs = 16 * (new * (length - new) + new * new // 2)
        floors = [1e6 * 2 * products / FLOPS for products in (pairs * 1088, pairs * 320 + 16 * length * 512 * 256)]
        row(
            "",
            new,
            length,
            f"{graph_us([absorbed]):.0f}",
            f"{graph_us([plain]):.0f}",
            f"{floors[0]:.0f}, {floors[1]:.0f}",
        )


def sweep() -> None:
    sms = num_multiprocessors(DEVICE)
    for lens, heads in (([1100], 16), ([8000], 16), ([1100] * 32, 16), ([12000] * 32, 16), ([12000] * 32, 128)):
        made, found = Cached(lens, heads), []
        rows = [16] if heads == 16 else [16, 32, 64]
        for block_m, tile, warps, stages, least in itertools.product(rows, (16, 32, 64), (4, 8), (2, 3, 4), (1, 2, 4)):
            config = LatentConfig(block_m, tile, sms // -(-heads // block_m), warps, stages, least)
            if least > 1 and len(lens) > 1:
                continue
            try:
                found.append((graph_us(made.decodes(config), 3), config))
            except Exception as failure:  # more shared memory or registers than there are
                print(config, type(failure).__name__, file=sys.stderr)
        for us, config in sorted(found, key=lambda one: one[0])[:6]:
            row(f"{len(lens)} x {lens[0]}, {heads} heads", f"{us:.1f}", tuple(config))


if __name__ == "__main__":
    torch.manual_seed(0)
    parts: dict[str, Callable[[], None]] = {
        "check": check,
        "decode": decode,
        "around": around,
        "prompts": prompts,
        "sweep": sweep,
    }
    for name in sys.argv[1:] or ("check", "decode", "around", "prompts"):
        parts[name]()
