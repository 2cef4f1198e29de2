"""The peer all-reduce on two GPUs against its reference; the workers run this file under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all-reduce ok") == 2


def work() -> None:
    import torch.distributed as dist

    from tpctl.kernels.all_reduce import PeerBuffer, all_reduce_add_rms_norm_reference

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    world = dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float32):
        peers = PeerBuffer(dist.group.WORLD, 300, 4096, dtype, device)
        generator = torch.Generator(device).manual_seed(7)  # the same on every rank
        limit = 1e-6 if dtype is torch.float32 else 8e-3
        for step in range(60):
            rows = (1, 300, 7, 64)[step % 4]
            hidden = (4096, 576, 1024)[step % 3]
            parts = torch.randn(world, rows, hidden, device=device, generator=generator).to(dtype)
            residual = torch.randn(rows, hidden, device=device, generator=generator).to(dtype)
            weight = torch.randn(hidden, device=device, generator=generator).to(dtype)
            flags = rows > peers.word_rows or bool((step // 4) % 2)
            total = peers.all_reduce(parts[rank], flags=flags)
            assert error(total, parts.double().sum(0)) < limit
            wide = residual.double()
            want = all_reduce_add_rms_norm_reference(parts.double(), wide, weight.double(), 1e-6)
            got = peers.all_reduce_add_rms_norm(parts[rank], residual, weight, 1e-6, flags=flags, pdl=step % 5 == 0)
            assert error(residual, wide) < limit
            assert error(got, want) < limit
            same_everywhere(got, total, residual)
        scores = torch.randn(world, 300, device=device, generator=generator)
        scores[:, ::3] = 1.0
        ids = torch.stack([torch.randperm(1000, device=device, generator=generator)[:300] for _ in range(world)])
        for _ in range(3):
            got = peers.winner(scores[rank], ids[rank])
            tied = torch.where(scores == scores.max(0).values, ids, 10**9).min(0).values
            assert torch.equal(got, tied)

        # Captured, replayed, and mixed with eager calls.
        x = torch.randn(5, 1024, device=device, generator=generator).to(dtype)
        out = torch.empty_like(x)
        peers.all_reduce(x, out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                peers.all_reduce(x, out=out)
        for step in range(200):
            x.fill_(step)
            graph.replay()
            if step % 7 == 0:
                peers.all_reduce(x, out=out)
            assert (out == torch.tensor(step * world, device=device, dtype=dtype)).all()
        assert not peers.timed_out()
    print("all-reduce ok", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def same_everywhere(*tensors: torch.Tensor) -> None:
    import torch.distributed as dist

    for tensor in tensors:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        assert all(torch.equal(gathered[0], other) for other in gathered)


if __name__ == "__main__":
    work()
