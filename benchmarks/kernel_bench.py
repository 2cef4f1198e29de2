"""Times tpctl's Triton kernels on one GPU, beside torch (cuBLAS, and flash-attn where it is installed).

    python benchmarks/kernel_bench.py [linear] [decode] [prefill] [small] [step] [launch]
    torchrun --nproc-per-node 2 benchmarks/kernel_bench.py all_reduce

Every figure is the median of several replays of a CUDA graph whose launches rotate through more memory than
the L2 cache holds. TB/s counts weights (linear, step) or keys and values (decode), read once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_all_reduce import bench_all_reduce
from kernel_step import bench_step
from kernel_timing import BF16, DEVICE, KV, LLAMA, QWEN, graph_us, make_cache, mixed_lengths, random_weights, row
from triton import __version__ as triton_version

from tpctl.kernels.attention.packed_kv import pack_reference
from tpctl.kernels.attention.paged_decode import LONG_CONTEXT, DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.attention.paged_prefill import paged_prefill
from tpctl.kernels.attention.rope_cache import rope_cache
from tpctl.kernels.common.activation import act_and_mul
from tpctl.kernels.common.norm import add_rms_norm, rms_norm
from tpctl.kernels.linear.gemv import GemvScratch, pick, small_linear
from tpctl.kernels.sampling.floors import Filters, sampling_floors
from tpctl.kernels.sampling.sampling import sample


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


def packed(caches: KV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same caches packed: keys, values, exponents (`kernels.attention.packed_kv`)."""
    keys, values = (pack_reference(cache.transpose(1, 2).contiguous()) for cache in caches)
    return keys[0], values[0], torch.stack([keys[1], values[1]], -1)


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
            pairs = seqs * length * (length + 1) // 2
            call = partial(paged_prefill, q, *caches, tables[0], starts, seq_lens, pairs=pairs, out=out)
            ours = graph_us([call] * 4)
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
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_version}")
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()
        print()


if __name__ == "__main__":
    main()
