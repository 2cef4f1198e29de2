"""Where an engine's time goes on GPUs: the ``nano`` workload by step, and by kernel at some batch sizes.

    python benchmarks/engine_profile.py qwen3-0.6b llama-3.1-8b [--steps 20] [--at 220 128 48] [--first 128 136]
    torchrun --nproc-per-node 2 benchmarks/engine_profile.py llama-3.1-8b

The engine runs in this process, or each rank's in one of torchrun's (rank 0 reports), without client and workers. The
first pass warms up and captures the CUDA graphs. The second times every step by the number of sequences it decodes.
The third runs PyTorch's profiler over the first ``--steps`` steps that compute prompts, and over as many at each batch
size of ``--at``, and adds up kernels of the same name. With ``--first`` there is none of this: single prompts of these
lengths are computed as a chat's question is, and told are the time until the step is launched, from then on until it
ends, and its kernels. 128 tokens beside 8 answers are as many rows as 136 by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import os
import statistics
import sys
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from tpctl.bench.synthetic import synthetic_shards
from tpctl.bench.workload import make_workload, one_request
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.wire.messages import Add
from tpctl.wire.settings import POLICIES, EngineConfig

_NUMBERS = itertools.count()
_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 512)


def add_work(engine: Engine, shift: int) -> int:
    work = make_workload("nano", engine.runner.loaded.config.vocab_size, shift)
    engine.apply(Add(work.requests))
    return work.output_tokens


def decoding(engine: Engine) -> int:
    """Sequences under way, or 0 while prompts are still being computed."""
    scheduler = engine.scheduler
    behind = any(sequence.num_uncomputed_tokens > 1 for sequence in scheduler.running.values())
    return 0 if scheduler.waiting or behind else len(scheduler.running)


def run(engine: Engine, shift: int) -> None:
    """One pass, timed; prints tokens a second and the time of a step by batch size."""
    tokens = add_work(engine, shift)
    spent: dict[int, list[float]] = defaultdict(list)
    started = time.perf_counter()
    while engine.has_work:
        rows = decoding(engine)
        before = time.perf_counter()
        engine.step()
        spent[next((b for b in _BUCKETS if rows <= b), rows) if rows else 0].append(time.perf_counter() - before)
    seconds = time.perf_counter() - started
    print(f"{tokens / seconds:.0f} tok/s, {seconds:.2f} s")
    for rows, times in sorted(spent.items()):
        name = f"up to {rows}" if rows else "prefill"
        mean = sum(times) / len(times)
        print(f"  {name:>10}: {len(times):5} steps, {mean * 1e3:8.3f} ms each, {sum(times):6.2f} s")


def show(prof: profile, steps: int, wall: float, title: str) -> None:
    sums: dict[str, list[float]] = defaultdict(list)
    for event in prof.events():  # type: ignore[no-untyped-call]
        if event.device_type.name == "CUDA":
            sums[event.name].append(event.device_time)
    total = sum(sum(times) for times in sums.values())
    print(f"{title}: {wall / steps * 1e3:.3f} ms a step, {total / steps / 1e3:.3f} in kernels")
    for name, times in sorted(sums.items(), key=lambda item: -sum(item[1]))[:14]:
        spent, each = sum(times) / steps / 1e3, sum(times) / len(times)
        print(f"  {spent:8.3f} ms {len(times) / steps:7.1f} x {each:8.1f} us  {name[:100]}")


def profiled(engine: Engine, shift: int, steps: int, at: list[int]) -> None:
    add_work(engine, shift)
    targets = sorted(at, reverse=True)

    def measure(title: str, *, prompts: bool = False) -> None:
        torch.cuda.synchronize()
        started, done = time.perf_counter(), 0
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            while engine.has_work and done < steps and not (prompts and decoding(engine)):
                engine.step()
                done += 1
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
        show(prof, max(done, 1), wall, title)

    measure("prefill", prompts=True)
    while engine.has_work:
        if targets and 0 < decoding(engine) <= targets[0]:
            rows = decoding(engine)
            targets.pop(0)
            measure(f"decode of {rows}")
        else:
            engine.step()


def first(engine: Engine, tokens: int, count: int = 10) -> None:
    """Single prompts of so many tokens, each with the device at rest before."""
    vocab_size = engine.runner.loaded.config.vocab_size
    host: list[float] = []
    device: list[float] = []

    def ask() -> None:
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.apply(Add([one_request(tokens, 1, next(_NUMBERS), vocab_size)]))
        engine.step()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        host.append(launched - started)
        device.append(time.perf_counter() - launched)
        while engine.has_work:
            engine.step()
        while engine.runner.rest():  # captures what has come
            pass

    for _ in range(8 + count):
        ask()
    for name, times in (("launched in", host), ("ended after", device)):
        ordered = [1e3 * one for one in sorted(times[8:])]
        print(f"  {tokens} tokens {name} {statistics.median(ordered):.3f} ms ({ordered[0]:.3f} to {ordered[-1]:.3f})")
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        started = time.perf_counter()
        for _ in range(5):
            ask()
        wall = time.perf_counter() - started
    show(prof, 5, wall, f"prompt of {tokens}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--at", type=int, nargs="*", default=[220, 128, 48])
    parser.add_argument("--first", type=int, nargs="*", default=[])
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--scheduling-policy", choices=POLICIES, default="fcfs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    group = TPGroup.from_environment("cuda") if "RANK" in os.environ else TPGroup(0, 1, "cuda")
    with contextlib.redirect_stdout(io.StringIO() if group.rank else sys.stdout):
        report(args, group)
    group.close()


def report(args: argparse.Namespace, group: TPGroup) -> None:
    for shape in args.shapes:
        folder = synthetic_shards(shape, group.size).folder
        config = EngineConfig(
            folder,
            group.size,
            device="cuda",
            max_model_len=args.max_model_len,
            max_num_seqs=512,
            max_num_batched_tokens=args.max_num_batched_tokens,
            scheduling_policy=args.scheduling_policy,
        )
        engine = Engine(config, group)
        print(f"== {shape}, {torch.cuda.get_device_name()}, {engine.runner.loaded.timings}")
        for tokens in args.first:
            first(engine, tokens)
        if not args.first:
            for shift in (0, 13):
                run(engine, shift)
            if args.at:
                profiled(engine, 26, args.steps, args.at)
        del engine
        gc.collect()  # captured graphs and what they captured know each other
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
