"""Checks and times prefill attention on Hopper, the Gluon kernel beside the Triton one.

    PYTHONPATH=. python benchmarks/prefill_bench.py [--seconds 20] [NAME ...]

Each kernel runs in a process of its own, which is killed when its time is up; one whose results are wrong is not timed.
Milliseconds are medians of replays of a CUDA graph; TFLOP/s count the products below the diagonal.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from functools import partial

import torch
from kernel_timing import BF16, DEVICE, Shape, graph_us, make_cache
from triton import __version__ as triton_version

from tpctl.kernels.attention.hopper_prefill import hopper_prefill
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference
from tpctl.kernels.common.ahead import KernelSpec, compile_for, compile_spec, unlaunched
from tpctl.kernels.common.launch import DeviceFacts, stand_for

Pairs = list[tuple[int, int]]
"""New tokens and cached ones of each sequence."""

HEADS = {"32/8 of 128": (32, 8, 128), "16/8 of 128": (16, 8, 128), "64/8 of 64": (64, 8, 64)}
TIMED: list[Pairs] = [[(16_000, 0)], [(4_000, 0)] * 4, [(1_024, 0)] * 16, [(512, 0)] * 32, [(256, 0)] * 64]
TIMED += [[(1_000, 0)], [(512, 0)], [(512, 15_000)], [(8_192, 65_536)]]
CHECKED: list[tuple[int, Pairs]] = [
    (128, [(300, 0)]),
    (128, [(70, 0), (3, 200), (129, 1)]),
    (256, [(700, 300), (257, 0), (128, 128), (1, 900)]),
    (128, [(1, 0), (64, 64), (128, 0), (130, 2_000), (1_500, 0)]),
]
"""Tokens of a block, and sequences."""
LARGEST_ERROR = 1.5e-2


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "triton": paged_prefill,  # where it is not told how much it is
    "gluon": hopper_prefill,
}


def case(pairs: Pairs, heads: tuple[int, int, int], block_size: int) -> tuple[torch.Tensor, ...]:
    """Queries, caches, block table, where sequences' queries begin, and their lengths."""
    num_heads, num_kv_heads, head_dim = heads
    shape = Shape("", 1, 0, num_heads, num_kv_heads, 0, 0, False, head_dim)
    (keys, values), tables, lens = make_cache([new + cached for new, cached in pairs], shape, block_size, 1)
    starts = torch.tensor([0, *torch.tensor([new for new, _ in pairs]).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), num_heads, head_dim, device=DEVICE, dtype=BF16)
    return q, keys, values, tables[0], starts.to(DEVICE), lens


def attention(name: str, arguments: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    out = torch.full_like(arguments[0], float("nan"))
    return partial(WAYS[name], *arguments, scale=arguments[0].shape[-1] ** -0.5, out=out)


def error(name: str, heads: tuple[int, int, int], block_size: int, pairs: Pairs) -> float:
    """The largest difference of a head's result from the reference in float32, in norms of what is wanted."""
    torch.manual_seed(len(pairs))
    arguments = case(pairs, heads, block_size)
    _, keys, values, table, _, lens = arguments
    for row, length in enumerate(lens.tolist()):
        if length % block_size:  # memory behind the end may hold anything
            for cache in (keys, values):
                cache[int(table[row, length // block_size]), length % block_size :] = float("nan")
    want = paged_prefill_reference(*(one.float() for one in arguments[:3]), *arguments[3:])
    got = attention(name, arguments)().float()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def run(name: str) -> None:
    """Check and time one kernel."""
    began = time.perf_counter()
    errors = [error(name, heads, *one) for heads in ((8, 2, 128), (8, 1, 64)) for one in CHECKED]
    wrong = not all(one < LARGEST_ERROR for one in errors)  # NaN is wrong
    print(f"{name:<12} errors:", *(f"{one:.1e}" for one in errors), "WRONG" * wrong,
          f"({time.perf_counter() - began:.1f} s)", flush=True)  # fmt: skip
    if wrong:
        return
    for label, heads in HEADS.items():
        for pairs in TIMED:
            (new, cached), count = pairs[0], len(pairs)
            ms = graph_us([attention(name, case(pairs, heads, 128))], 3) / 1e3
            flops = 4 * count * new * (cached + new / 2) * heads[0] * heads[2]
            tokens = f"{count} x {new}" + (f" after {cached}" if cached else "")
            print(f"{name:<12} {label:<12} {tokens:<20} {ms:>8.3f} ms {flops / ms / 1e9:>5.0f} TFLOP/s", flush=True)
    print(f"{name:<12} took {time.perf_counter() - began:.1f} s", flush=True)


def compile_first(name: str) -> None:
    """Compile one kernel for an H200 into Triton's cache, without a device."""
    facts = DeviceFacts((9, 0), 132, 232448)
    compile_for(facts)
    stand_for(facts)
    specs: dict[KernelSpec, None] = {}
    with unlaunched(specs):
        for num_heads, num_kv_heads, head_dim in HEADS.values():
            q = torch.empty(16_000, num_heads, head_dim, device="meta", dtype=BF16)
            cache = torch.empty(200, 128, num_kv_heads, head_dim, device="meta", dtype=BF16)
            table, starts, lens = (torch.empty(size, device="meta", dtype=torch.int32) for size in ((1, 200), 2, 1))
            attention(name, (q, cache, cache, table, starts, lens))()
    for spec in specs:
        compile_spec(spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"kernels: {', '.join(WAYS)}; default all")
    parser.add_argument("--seconds", type=float, default=20, help="of each kernel, at most")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton_version}", flush=True)
    context = multiprocessing.get_context("fork")  # nothing is imported again; CUDA begins in the children
    names = options.names or list(WAYS)
    began = time.perf_counter()
    compiling = [context.Process(target=compile_first, args=(name,)) for name in names]
    for child in compiling:
        child.start()
    for child in compiling:
        child.join()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    for name in names:
        child = context.Process(target=run, args=(name,))
        child.start()
        child.join(options.seconds)
        if child.is_alive():
            print(f"{name:<12} did not end within {options.seconds:g} s: killed", flush=True)
            child.kill()
            child.join()
        elif child.exitcode:
            print(f"{name:<12} ended with {child.exitcode}", flush=True)


if __name__ == "__main__":
    main()
