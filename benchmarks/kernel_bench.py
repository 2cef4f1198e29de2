"""Times tpctl's Triton kernels on one GPU, beside torch (cuBLAS, and flash-attn where it is installed).

    python benchmarks/kernel_bench.py [linear] [decode] [prefill] [small] [step] [launch]
    torchrun --nproc-per-node 2 benchmarks/kernel_bench.py all_reduce

Every figure is the median of several replays of a CUDA graph whose launches rotate through more memory than
the L2 cache holds. TB/s counts weights (linear, step) or keys and values (decode), read once.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

try:
    import triton
except ImportError:
    raise SystemExit("this times Triton kernels: it needs the package triton and a CUDA GPU") from None

from tpctl.kernels.attention.packed_kv import pack_reference
from tpctl.kernels.attention.paged_decode import LONG_CONTEXT, DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.attention.paged_prefill import paged_prefill
from tpctl.kernels.attention.rope_cache import rope_cache
from tpctl.kernels.common.activation import act_and_mul
from tpctl.kernels.common.launch import num_multiprocessors
from tpctl.kernels.common.norm import add_rms_norm, rms_norm
from tpctl.kernels.linear.gated_linear import gated_linear, pick_gated
from tpctl.kernels.linear.gemv import GemvScratch, pick, small_linear
from tpctl.kernels.linear.split_linear import pick_splits, split_linear
from tpctl.kernels.sampling.floors import Filters, sampling_floors
from tpctl.kernels.sampling.sampling import sample

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


def bench_linear() -> None:
    row("linear (norm / residual / silu fused)", "rows", "us", "TB/s", "cuBLAS us")
    scratch = GemvScratch.allocate(DEVICE)
    for shape in (QWEN, QWEN.half(), LLAMA, LLAMA.half()):
        for name, out_features, in_features, gated in shape.linears():
            weight_rows = out_features * (2 if gated else 1)
            size = weight_rows * in_features * 2
            weights = random_weights(max(2, min(24, int(2.5e8 / size))), weight_rows, in_features)
            many = weights * max(1, 20 // len(weights)) if size < 1e8 else weights
            for rows in (1, 4, 16, 32):
                x = torch.randn(rows, in_features, device=DEVICE, dtype=BF16)
                out = torch.empty(rows, out_features, device=DEVICE, dtype=BF16)
                plain = graph_us([partial(torch.nn.functional.linear, x, w) for w in many])
                if pick(rows, out_features, in_features, gated=gated) is None:
                    row(f"{shape.name} {name} {weight_rows}x{in_features}", rows, "-", "-", f"{plain:.1f}")
                    continue
                options: dict[str, Any] = {"residual_TO": out} if name in ("o", "down") else {"norm": (x[0], 1e-6)}
                if gated:
                    options["activation"] = "silu"
                fused = graph_us([partial(small_linear, x, w, scratch, out=out, pdl=True, **options) for w in many])
                rate = f"{size / fused / 1e6:.2f}"
                row(f"{shape.name} {name} {weight_rows}x{in_features}", rows, f"{fused:.1f}", rate, f"{plain:.1f}")


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


def packed(caches: KV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same caches packed: keys, values, exponents (`kernels.attention.packed_kv`)."""
    keys, values = (pack_reference(cache.transpose(1, 2).contiguous()) for cache in caches)
    return keys[0], values[0], torch.stack([keys[1], values[1]], -1)


def mixed_lengths(count: int, low: int, high: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randint(low, high) for _ in range(count)]


def bench_decode() -> None:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        flash_attn_with_kvcache = None
    row("decode", "batch", "context", "us", "TB/s", "packed us", "flash-attn")
    cases = [[context] * batch for batch in (1, 32, 256) for context in (512, 4096, 32768)]
    cases += [[1500] * 8, mixed_lengths(32, 100, 2000), mixed_lengths(128, 100, 2000), mixed_lengths(256, 100, 1650)]
    for shape in (QWEN, QWEN.half(), LLAMA, LLAMA.half()):
        for lens in cases:
            size = sum(lens) * shape.kv_heads * shape.head_dim * 4
            layers = max(1, min(48, int(3e8 / size)))
            caches, tables, seq_lens = make_cache(lens, shape, 256, layers)
            q = torch.randn(len(lens), shape.heads, shape.head_dim, device=DEVICE, dtype=BF16)
            out = torch.empty_like(q)
            scratch = DecodeScratch.allocate(len(lens), shape.heads, shape.head_dim, DEVICE)
            long = len(lens) <= 2 and max(lens) >= LONG_CONTEXT
            plan = DecodePlan(len(lens), shape.heads, shape.kv_heads, shape.head_dim, 256, scratch, long=long)
            plan.update(seq_lens)
            tables = tables * max(1, 4 // layers)
            ours = graph_us([partial(paged_decode, q, *caches, t, seq_lens, plan, out=out, pdl=True) for t in tables])
            less = "-"
            if sum(lens) * layers < 2_000_000:  # packing takes several times the memory
                k, v, exponents = packed(caches)
                narrow = DecodePlan(
                    len(lens), shape.heads, shape.kv_heads, shape.head_dim, 256, scratch, long=long, packed=True
                )
                narrow.update(seq_lens)
                call = partial(paged_decode, q, k, v, factors=exponents, out=out, pdl=True)
                us = graph_us([partial(call, block_tables=t, seq_lens_S=seq_lens, plan=narrow) for t in tables])
                less = f"{us:.1f}"
            theirs = "-"
            if flash_attn_with_kvcache is not None:
                us = graph_us(
                    [
                        partial(
                            flash_attn_with_kvcache,
                            q[:, None],
                            *caches,
                            cache_seqlens=seq_lens,
                            block_table=t,
                            causal=True,
                        )
                        for t in tables
                    ]
                )
                theirs = f"{us:.1f}"
            row(f"{shape.name} {shape.heads}/{shape.kv_heads} heads", len(lens), sum(lens) // len(lens), f"{ours:.1f}",
                f"{size / ours / 1e6:.2f}", less, theirs)  # fmt: skip


def bench_prefill() -> None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        flash_attn_varlen_func = None
    row("prefill", "sequences", "tokens each", "us", "TFLOP/s", "packed us", "flash-attn")
    for shape in (QWEN, LLAMA):
        for block_size, seqs, length in ((256, 16, 512), (256, 8, 1024), (64, 8, 1024), (16, 8, 1024), (256, 1, 8192)):
            caches, tables, seq_lens = make_cache([length] * seqs, shape, block_size, 1)
            q = torch.randn(seqs * length, shape.heads, shape.head_dim, device=DEVICE, dtype=BF16)
            starts = torch.arange(0, seqs * length + 1, length, dtype=torch.int32, device=DEVICE)
            out = torch.empty_like(q)
            ours = graph_us([partial(paged_prefill, q, *caches, tables[0], starts, seq_lens, out=out)] * 4)
            k, v, exponents = packed(caches)
            less = graph_us(
                [partial(paged_prefill, q, k, v, tables[0], starts, seq_lens, factors=exponents, out=out)] * 4
            )
            flops = 2 * seqs * length * length * shape.heads * shape.head_dim
            theirs = "-"
            if flash_attn_varlen_func is not None and block_size == 256:
                call = partial(
                    flash_attn_varlen_func,
                    q,
                    *caches,
                    starts,
                    starts,
                    length,
                    length,
                    causal=True,
                    block_table=tables[0],
                )
                theirs = f"{graph_us([call] * 4):.0f}"
            row(f"{shape.name} block {block_size}", seqs, length, f"{ours:.0f}", f"{flops / ours / 1e6:.0f}",
                f"{less:.0f}", theirs)  # fmt: skip


def bench_small() -> None:
    row("small kernels", "rows", "us", "us with pdl")
    for shape in (QWEN, LLAMA):
        tables = (torch.rand(4096, 64, device=DEVICE), torch.rand(4096, 64, device=DEVICE))
        cache = torch.empty(128, 64, shape.kv_heads, 128, device=DEVICE, dtype=BF16)
        weight = torch.rand(shape.hidden, device=DEVICE, dtype=BF16)
        for rows in (1, 16, 256, 8192):
            x = torch.randn(rows, shape.hidden, device=DEVICE, dtype=BF16)
            residual, normed = torch.zeros_like(x), torch.empty_like(x)
            gate_up = torch.randn(rows, 2 * shape.intermediate, device=DEVICE, dtype=BF16)
            qkv = torch.randn(rows, (shape.heads + 2 * shape.kv_heads) * 128, device=DEVICE, dtype=BF16)
            positions = torch.arange(rows, device=DEVICE) % 4096
            slots = torch.randperm(8192, device=DEVICE)[:rows]
            norms: dict[str, Any] = {"q_norm": weight[:128], "k_norm": weight[:128]} if shape.qk_norm else {}
            logits = torch.randn(min(rows, 256), shape.vocab, device=DEVICE, dtype=BF16)
            temperatures = torch.full((rows,), 0.6, device=DEVICE)
            keys = torch.randint(0, 2**32, (rows, 2), device=DEVICE)
            calls: dict[str, Callable[..., object]] = {
                "rms_norm": partial(rms_norm, x, weight, 1e-6, out=normed),
                "add_rms_norm": partial(add_rms_norm, x, residual, weight, 1e-6, out=normed),
                "silu_and_mul": partial(act_and_mul, gate_up),
                "rope_cache": partial(rope_cache, qkv, cache, cache, tables, positions, slots, shape.heads, **norms),
            }
            if rows <= 256:
                calls["sample"] = partial(sample, logits, temperatures, keys)
                counts = torch.full((rows,), 20, dtype=torch.int32, device=DEVICE)
                filters = Filters(temperatures, 0 * counts, 0 * temperatures + 0.95, 0 * temperatures)
                floors = partial(sampling_floors, logits.unsqueeze(0), vocab_size=shape.vocab)
                calls["floors of top-p"] = partial(floors, filters, both=False)
                calls["floors of top-k, then top-p"] = partial(floors, filters._replace(top_k=counts), both=True)
            for name, call in calls.items():
                times = [graph_us([partial(call, pdl=pdl)] * 20) for pdl in (False, True)]
                row(f"{shape.name} {name}", rows, *(f"{us:.1f}" for us in times))


PDL = frozenset({"qkv", "rope", "decode", "o", "gate_up", "down", "lm_head", "norm", "silu", "sample"})


class Step:
    """One decode step of random weights: every kernel from the first norm to the sampled ids.

    pdl: the kernels launched with programmatic dependent launch, by name.
    """

    def __init__(self, shape: Shape, lens: list[int]) -> None:
        self.shape, self.batch = shape, len(lens)
        self.pdl: frozenset[str] = frozenset()
        self.weights = {
            name: random_weights(1 if name == "lm_head" else shape.layers, out * (2 if gated else 1), inp)
            for name, out, inp, gated in shape.linears()
        }
        self.bytes = sum(w.numel() * 2 for ws in self.weights.values() for w in ws)
        self.norm = torch.rand(shape.hidden, device=DEVICE, dtype=BF16)
        self.qk: dict[str, Any] = {}
        if shape.qk_norm:
            self.qk = {"q_norm": self.norm[: shape.head_dim], "k_norm": self.norm[: shape.head_dim]}
        self.caches, self.tables, self.lens = make_cache(lens, shape, 256, shape.layers)
        self.bytes += sum(lens) * shape.kv_heads * shape.head_dim * 4 * shape.layers
        scratch = DecodeScratch.allocate(self.batch, shape.heads, shape.head_dim, DEVICE)
        self.plan = DecodePlan(self.batch, shape.heads, shape.kv_heads, shape.head_dim, 256, scratch)
        self.scratch = GemvScratch.allocate(DEVICE)
        self.x = torch.randn(self.batch, shape.hidden, device=DEVICE, dtype=BF16)
        self.rope = (torch.rand(40960, 64, device=DEVICE), torch.rand(40960, 64, device=DEVICE))
        self.positions = self.lens.long() - 1
        self.slots = torch.arange(self.batch, device=DEVICE) * 256
        self.temperatures = torch.full((self.batch,), 0.6, device=DEVICE)
        self.keys = torch.randint(0, 2**32, (self.batch, 2), device=DEVICE)

    def linear(
        self, name: str, layer: int, x: torch.Tensor, delta: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear `name` with its norm, activation or addition; returns (result, what is still to be added to x)."""
        weight = self.weights[name][layer]
        adds, gated = name in ("o", "down"), name == "gate_up"
        config = pick(x.shape[0], weight.shape[0] // (2 if gated else 1), weight.shape[1], gated=gated)
        if adds:
            if config is not None:
                return small_linear(x, weight, self.scratch, residual_TO=self.x, out=self.x, pdl=name in self.pdl), None
            splits = pick_splits(x.shape[0], *weight.shape)
            return x, torch.nn.functional.linear(x, weight) if splits == 1 else split_linear(x, weight, splits)
        if config is not None and delta is None:
            options: dict[str, Any] = {"activation": "silu"} if gated else {}
            return small_linear(x, weight, self.scratch, norm=(self.norm, 1e-6), pdl=name in self.pdl, **options), None
        if delta is not None:
            x = add_rms_norm(delta, self.x, self.norm, 1e-6, pdl="norm" in self.pdl)
        else:
            x = rms_norm(x, self.norm, 1e-6, pdl="norm" in self.pdl)
        if gated:
            tiles = pick_gated(x.shape[0], weight.shape[0] // 2, x.shape[1], num_multiprocessors(DEVICE))
            if tiles is not None:
                return gated_linear(x, weight, tiles, pdl="gate_up" in self.pdl), None
        y = torch.nn.functional.linear(x, weight)
        return (act_and_mul(y, pdl="silu" in self.pdl) if gated else y), None

    def __call__(self) -> torch.Tensor:
        delta = None
        self.plan.update(self.lens)
        for layer in range(self.shape.layers):
            qkv, _ = self.linear("qkv", layer, self.x, delta)
            q = rope_cache(
                qkv,
                *self.caches,
                self.rope,
                self.positions,
                self.slots,
                self.shape.heads,
                pdl="rope" in self.pdl,
                **self.qk,
            )
            a = paged_decode(q, *self.caches, self.tables[layer], self.lens, self.plan, pdl="decode" in self.pdl)
            _, delta = self.linear("o", layer, a.view(self.batch, -1), None)
            h, _ = self.linear("gate_up", layer, self.x, delta)
            _, delta = self.linear("down", layer, h, None)
        logits, _ = self.linear("lm_head", 0, self.x, delta)
        return sample(logits, self.temperatures, self.keys, pdl="sample" in self.pdl)[1]


def bench_step() -> None:
    row("decode step", "batch", "context", "ms", "ms with pdl", "TB/s")
    for shape in (QWEN, LLAMA, LLAMA.half()):
        for lens in ([256], [256] * 8, [900] * 64, mixed_lengths(256, 100, 1650)):
            step = Step(shape, lens)
            times = []
            for step.pdl in (frozenset(), PDL):
                times.append(graph_us([step]))
            row(shape.name, len(lens), sum(lens) // len(lens), *(f"{us / 1e3:.3f}" for us in times),
                f"{step.bytes / min(times) / 1e6:.2f}")  # fmt: skip
            del step


def bench_launch() -> None:
    """Host time of one call outside a graph."""
    row("host time of a launch", "us")
    x = torch.randn(1, 1024, device=DEVICE, dtype=BF16)
    weight = torch.randn(1024, 1024, device=DEVICE, dtype=BF16)
    scratch = GemvScratch.allocate(DEVICE)
    out = torch.empty_like(x)
    caches, tables, seq_lens = make_cache([200], QWEN, 256, 1)
    q = torch.randn(1, 16, 128, device=DEVICE, dtype=BF16)
    plan = DecodePlan(1, 16, 8, 128, 256, DecodeScratch.allocate(1, 16, 128, DEVICE))
    calls: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: rms_norm(x, weight[0], 1e-6, out=out),
        "small_linear": lambda: small_linear(x, weight, scratch, out=out),
        "paged_decode": lambda: paged_decode(q, *caches, tables[0], seq_lens, plan, out=q),
        "torch linear": lambda: torch.nn.functional.linear(x, weight),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        times = []
        for _ in range(300):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        row(name, f"{sorted(times)[150] * 1e6:.1f}")


def bench_all_reduce() -> None:
    """All-reduce alone and fused with addition and norm, beside NCCL; run under torchrun."""
    import torch.distributed as dist

    from tpctl.kernels.collective.all_reduce import PeerBuffer

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    hidden = 4096
    world = dist.group.WORLD
    assert world is not None  # the line above made it
    peers = PeerBuffer.connect(world, 1024, hidden, BF16, device)
    weight = torch.rand(hidden, device=device, dtype=BF16)
    if rank == 0:
        row(f"all-reduce, {dist.get_world_size()} GPUs, us", "rows", "KiB", "alone", "+ norm", "+ norm, pdl",
            "2 runs + norm", "NCCL", "NCCL + norm")  # fmt: skip
    for rows in (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        x = torch.randn(rows, hidden, device=device, dtype=BF16)
        runs = torch.randn(2, rows, hidden, device=device, dtype=BF16)
        residual, out = torch.zeros_like(x), torch.empty_like(x)
        fused = peers.all_reduce_add_rms_norm

        def nccl_norm(x: torch.Tensor = x, residual: torch.Tensor = residual, out: torch.Tensor = out) -> None:
            dist.all_reduce(x)
            add_rms_norm(x, residual, weight, 1e-6, out=out)

        calls: list[Callable[[], object]] = [
            lambda: peers.all_reduce(x, out=out),  # noqa: B023
            lambda: fused(x, residual, weight, 1e-6, out=out),  # noqa: B023
            lambda: fused(x, residual, weight, 1e-6, out=out, pdl=True),  # noqa: B023
            lambda: fused(runs, residual, weight, 1e-6, out=out),  # noqa: B023
            lambda: dist.all_reduce(x),  # noqa: B023
            nccl_norm,
        ]
        times = []
        for call in calls:
            x.normal_()
            dist.barrier()
            times.append(graph_us([call] * 20))
        if rank == 0:
            row("", rows, rows * hidden // 512, *(f"{us:.1f}" for us in times))
    score = torch.randn(256, device=device)
    token = torch.arange(256, device=device)
    us = graph_us([lambda: peers.winner(score, token)] * 20)
    if rank == 0:
        row("winner of 256 rows", 256, 3, f"{us:.1f}")
    if peers.timed_out():
        raise RuntimeError("a wait for a peer ran out")
    dist.barrier()
    dist.destroy_process_group()


SECTIONS = {
    "linear": bench_linear,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "small": bench_small,
    "step": bench_step,
    "launch": bench_launch,
}


def main() -> None:
    """Run the sections named on the command line, or all."""
    torch.manual_seed(0)
    if sys.argv[1:] == ["all_reduce"]:
        bench_all_reduce()
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()
        print()


if __name__ == "__main__":
    main()
