"""Times one token's mixtures on one GPU: experts read through rings (`row_ring`) beside the kernels that are in use.

    PYTHONPATH=. python benchmarks/expert_ring_bench.py [--shapes qwen gpt-oss qwen-fp8] [--kernels] [--dry-run]

A call is all of a mixture: norm, router, choice, experts, residual. Of each shape several layers with routers of their
own are replayed in turn from one CUDA graph, so that no call finds its weights in the L2 cache. Every figure stands
beside the error of its result, from what the weights stand for in float32; a time counts only beside a small one. "of
4.8": the chosen weights' bytes over the time, of 4.8 TB/s. A configuration is warps of a team x teams, rows on their
way and at once, registers, least KB of shared memory; of gate_up, then of down. --kernels: by kernel, from the end of
one before to its own end. All kernels are compiled first, a process a core; --dry-run ends there, and needs no GPU.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from compiling import compile_all
from expert_cases import GPT_OSS, QWEN, Shape
from kernel_timing import BF16, graph_us, row

from tpctl.kernels.common.ahead import KernelSpec, compile_for, unlaunched
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import DeviceFacts, is_hopper, num_multiprocessors, stand_for
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.codes_row import codes_row
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.matrices import ExpertMatrices, experts_reference
from tpctl.kernels.experts.one_row import one_row
from tpctl.kernels.experts.routing import GateScratch, Router, gate
from tpctl.kernels.experts.row_ring import RingConfigs, pick_row_ring, row_ring

CALLS, LAYERS = 12, 3
BANDWIDTH = 4.8e6
"""Bytes a microsecond, by an H200's datasheet."""
H200 = DeviceFacts((9, 0), 132, 232448)

Changes = tuple[dict[str, int], dict[str, int]]
"""Of what is picked for gate_up and for down."""


class Case(NamedTuple):
    """A model's experts; how they are stored; bits of a weight with its scales; what is tried beside what is picked."""

    shape: Shape
    kind: str
    bits: float
    tries: tuple[Changes, ...]


TWOS = {"step": 2, "ahead": 6}
FOURS = {"step": 4, "ahead": 4}
CASES = {
    "qwen": Case(QWEN, "bf16", 16, (
        (FOURS, FOURS),
        ({"ahead": 4, "least": 0}, {}),
        ({"share": 4, "teams": 4, "ahead": 6, "registers": 64}, {}),
        ({}, {"share": 4, "teams": 2, "ahead": 4}),
    )),
    "gpt-oss": Case(GPT_OSS, "e2m1", 4.25, (
        (TWOS, TWOS),
        ({"least": 0}, {}),
        ({"share": 2, "teams": 4, "ahead": 8}, {}),
        ({}, {"share": 4, "teams": 2, "ahead": 4}),
    )),
    "qwen-fp8": Case(QWEN, "e4m3", 8, (
        ({"step": 2, "ahead": 4}, TWOS),
        ({"share": 2, "teams": 4}, {}),
        ({"least": 0}, {}),
        ({}, {"share": 4, "teams": 2, "ahead": 4}),
    )),
}  # fmt: skip


class Mixture(NamedTuple):
    """What a call takes."""

    x: torch.Tensor
    router: Router
    scratch: GateScratch
    experts: ExpertMatrices[Any]
    norm: tuple[torch.Tensor, float]


def matrix(case: Case, n: int, k: int, device: torch.device) -> Any:
    """Random weights whose products with normal inputs are near 1."""
    count, size = case.shape.count, k**-0.5
    if case.kind == "bf16":
        return DenseMatrix(torch.randn(count, n, k, device=device, dtype=BF16).mul_(size))
    packed = case.kind == "e2m1"
    if packed:
        values = torch.randint(0, 256, (count, n, k // 2), device=device, dtype=torch.uint8)
        scales = torch.randint(119, 122, (count, n, k // 32), device=device, dtype=torch.uint8)
        return CodedMatrix(Codes("e2m1", k, values, scales, unit=32))
    values = torch.randn(count, n, k, device=device, dtype=BF16).to(torch.float8_e4m3fn)
    scales = torch.rand(count, -(-n // 128), -(-k // 128), device=device).add_(0.5).mul_(size).to(BF16)
    rows = torch.arange(n, device=device, dtype=torch.int32) // 128
    return CodedMatrix(Codes("e4m3", k, values, scales, rows=rows, unit=128))


def mixtures(case: Case, device: torch.device, calls: int, layers: int) -> list[Mixture]:
    shape = case.shape
    count, hidden, width = shape.count, shape.hidden, shape.width
    random = partial(torch.randn, device=device, dtype=BF16)
    made = []
    for _ in range(layers):
        gate_up, down = matrix(case, 2 * width, hidden, device), matrix(case, hidden, width, device)
        more: dict[str, Any] = {"activation": shape.activation, "interleaved": shape.interleaved}
        if shape.interleaved:
            more |= {"gate_up_bias": random(count, 2 * width), "down_bias": random(count, hidden)}
        made.append((ExpertMatrices if case.kind == "bf16" else CodedExperts)(gate_up, down, **more))
    scratch = GateScratch.allocate(device)
    norm = (torch.ones(hidden, device=device, dtype=BF16), 1e-6)
    routers = [Router(random(count, hidden) / 50, shape.routing, shape.per_token) for _ in range(calls)]
    return [Mixture(random(1, hidden), one, scratch, made[i % layers], norm) for i, one in enumerate(routers)]


def in_use(one: Mixture, *, pdl: bool = True) -> torch.Tensor:
    """As `layers.weights.experts_cuda` has it."""
    x, router, scratch, experts, norm = one
    if isinstance(experts, CodedExperts):
        routed = gate(x, router, scratch, norm=norm, pdl=pdl)
        return codes_row(routed, experts, total_experts=experts.count, residual_TH=x, pdl=pdl)
    return one_row(x, router, scratch, experts, norm=norm, residual_TH=x, pdl=pdl)


def ringed(one: Mixture, configs: RingConfigs, *, pdl: bool = True) -> torch.Tensor:
    return row_ring(*one[:4], norm=one.norm, residual_TH=one.x, configs=configs, pdl=pdl)


def configurations(case: Case, one: Mixture) -> Iterator[RingConfigs]:
    """What is picked, and what else is tried."""
    device = one.x.device
    picked = pick_row_ring(
        one.router, one.experts, multiprocessors=num_multiprocessors(device), hopper=is_hopper(device)
    )
    if picked is None:
        raise SystemExit(f"{case.shape.name} ({case.kind}): no ring is picked; this times what Hopper GPUs run")
    yield picked
    for up, down in case.tries:
        yield picked[0]._replace(**up), picked[1]._replace(**down)


def specs_of(cases: list[Case], facts: DeviceFacts) -> list[KernelSpec]:
    """All kernels that will be launched."""
    stand_for(facts)
    found: dict[KernelSpec, None] = {}
    with unlaunched(found):
        for case in cases:
            (one,) = mixtures(case, torch.device("meta"), 1, 1)
            configs = list(configurations(case, one))
            for pdl in (True, False):
                in_use(one, pdl=pdl)
                ringed(one, configs[0], pdl=pdl)
            for tried in configs[1:]:
                ringed(one, tried)
    stand_for(None)
    return list(found)


def told(config: Any) -> str:
    return f"{config.share}x{config.teams} {config.ahead} {config.step} {config.registers} {config.least >> 10}"


def bench(case: Case, device: torch.device, *, kernels: bool) -> None:
    made = mixtures(case, device, CALLS, LAYERS)
    shape = case.shape
    bytes_read = shape.bytes(shape.per_token, case.bits)
    first = made[0]
    routed = gate(*first[:3], norm=first.norm)
    want = experts_reference(routed.x, routed.ids, routed.weights, first.experts, torch.float32) + first.x.float()

    def line(name: str, call: Callable[..., torch.Tensor], *, pdl: bool = True) -> None:
        try:
            error = float((call(first, pdl=pdl).float() - want).norm() / want.norm())
            us = graph_us([partial(call, one, pdl=pdl) for one in made])
        except Exception as failed:  # it takes more than there is: the next one may not
            row(name, f"{type(failed).__name__}: {str(failed).splitlines()[0][:80]}")
            return
        verdict = f"{error:.1e}" if error < 5e-3 else f"WRONG {error:.1e}"
        row(name, f"{us:.2f}", f"{bytes_read / us / BANDWIDTH:.0%}", verdict)

    row(f"{shape.name} {case.kind}, {bytes_read / 1e6:.1f} MB", "us", "of 4.8", "error")
    line("in use", in_use)
    line("in use, not launched early", in_use, pdl=False)
    configs = list(configurations(case, first))
    for up, down in configs:
        line(f"ring {told(up)} | {told(down)}", partial(ringed, configs=(up, down)))
    line("ring as picked, not launched early", partial(ringed, configs=configs[0]), pdl=False)
    if kernels:
        by_kernel("in use", partial(in_use), made)
        by_kernel("ring", partial(ringed, configs=configs[0]), made)


def by_kernel(name: str, call: Callable[..., torch.Tensor], made: list[Mixture]) -> None:
    """Mean microseconds from the end of the kernel before to the end of each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for one in made * 2:
            call(one, pdl=True)
        torch.cuda.synchronize()
    events = [one for one in profile.events() or [] if one.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda one: one.time_range.end)
    times: dict[str, list[float]] = defaultdict(list)
    for before, after in pairwise(events):
        times[f"{after.name} behind {before.name}"].append(after.time_range.end - before.time_range.end)
    for which, taken in times.items():
        row(f"{name}: {which}", f"{sorted(taken)[len(taken) // 2]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--kernels", action="store_true", help="times by kernel, too")
    parser.add_argument("--dry-run", action="store_true", help="compile for an H200, time nothing")
    args = parser.parse_args()
    cases, start = [CASES[name] for name in args.shapes], time.monotonic()
    if args.dry_run:
        compile_for(H200)
        facts = H200
    else:
        facts = DeviceFacts.of(torch.device("cuda"))
    specs = specs_of(cases, facts)
    failed = compile_all(specs, facts)
    print(
        f"{len(specs) - len(failed)} kernels compiled, {time.monotonic() - start:.1f} s", *failed, sep="\n", flush=True
    )
    if args.dry_run:
        raise SystemExit(bool(failed))
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with torch.inference_mode():
        for case in cases:
            bench(case, torch.device("cuda"), kernels=args.kernels)
            torch.cuda.empty_cache()
            print(f"{time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
