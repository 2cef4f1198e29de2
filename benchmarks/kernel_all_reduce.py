"""All-reduce between GPUs (``kernel_bench.py all_reduce``, under torchrun)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from kernel_timing import BF16, graph_us, row

from tpctl.kernels.common.norm import add_rms_norm


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
