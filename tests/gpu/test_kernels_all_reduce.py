"""The peer all-reduce on two GPUs against its reference; the workers run this file under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tpctl.kernels import all_reduce
from tpctl.kernels.all_reduce import PeerBuffer, all_reduce_add_rms_norm_reference
from tpctl.kernels.all_reduce_kernels import EMPTY

pytestmark = pytest.mark.gpu
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRET else "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all-reduce ok") == 2


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRET else [torch.bfloat16, torch.float32])
def test_two_ends_in_turn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Two ranks of one process: what rank 1 will send is put into rank 0's buffer by hand before rank 0 runs."""
    monkeypatch.setattr(all_reduce, "_MAX_POLLS", 3)
    rows, hidden = 5, 192
    words = PeerBuffer.buffer_words(2, rows, hidden, dtype)
    buffers = [torch.full((words,), EMPTY, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    ends = [PeerBuffer(rank, pointers, rows, hidden, dtype) for rank in range(2)]
    weight = torch.randn(hidden).to(DEVICE, dtype)
    for call in range(1, 6):
        runs = torch.randn(2, 1 + call % 2, rows, hidden).to(DEVICE, dtype)
        runs[:, :, 0, ::2] = 0.0
        runs[:, :, 1] = -0.0
        parts = runs.float().sum(1).to(dtype)
        sent = parts[1].contiguous().view(torch.int32)
        slots = buffers[0].view(2, 2, -1, ends[0].row_words)[call % 2, 1, :rows, : sent.shape[1]]
        sent = torch.where(sent == EMPTY, 0, sent)
        slots.copy_(sent)
        old = torch.randn(rows, hidden).to(DEVICE, dtype)
        results = []
        for rank in range(2):
            residual = old.clone()
            given = runs[rank] if call % 2 else runs[rank, 0]
            results.append((ends[rank].all_reduce_add_rms_norm(given, residual, weight, 1e-6), residual))
            assert (buffers[rank] == EMPTY).all()
        assert torch.equal(slots.view(dtype), sent.view(dtype))  # but for the signs of zeros
        slots.fill_(EMPTY)
        want_residual = old.double()
        want = all_reduce_add_rms_norm_reference(parts.double(), want_residual, weight.double(), 1e-6)
        for got, residual in results:
            assert error(residual, want_residual) < (1e-6 if dtype is torch.float32 else 8e-3)
            assert error(got, want) < (1e-6 if dtype is torch.float32 else 8e-3)
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        assert not ends[0].timed_out() and not ends[1].timed_out()
    ends[0].all_reduce(parts[0])  # nobody answers
    assert ends[0].timed_out()
    assert ends[0].winner(torch.zeros(rows, device=DEVICE), torch.arange(rows, device=DEVICE)).tolist() == [-1] * rows


def work() -> None:
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    world = dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float32):
        peers = PeerBuffer.connect(dist.group.WORLD, 300, 4096, dtype, device)
        generator = torch.Generator(device).manual_seed(7)  # the same on every rank
        limit = 1e-6 if dtype is torch.float32 else 8e-3
        for step in range(60):
            rows = (1, 700, 7, 64)[step % 4]  # 700: several launches
            hidden = (4096, 576, 1024)[step % 3]
            parts = torch.randn(world, rows, hidden, device=device, generator=generator).to(dtype)
            residual = torch.randn(rows, hidden, device=device, generator=generator).to(dtype)
            weight = torch.randn(hidden, device=device, generator=generator).to(dtype)
            # Both zeros, alone and in pairs: one of them stands for an empty slot.
            parts[:, :, ::3] = 0.0
            parts[:, :, 1::5] = -0.0
            total = peers.all_reduce(parts[rank])
            assert error(total, parts.double().sum(0)) < limit
            wide = residual.double()
            want = all_reduce_add_rms_norm_reference(parts.double(), wide, weight.double(), 1e-6)
            given = parts[rank]
            if step % 3 == 1:  # runs of it, as `split_linear` leaves them
                first = torch.randn(rows, hidden, device=device, generator=generator).to(dtype)
                given = torch.stack([first, given - first])
                summed = torch.stack([torch.empty_like(first) for _ in range(world)])
                dist.all_gather(list(summed.unbind(0)), given.float().sum(0).to(dtype))
                wide = residual.double()
                want = all_reduce_add_rms_norm_reference(summed.double(), wide, weight.double(), 1e-6)
            got = peers.all_reduce_add_rms_norm(given, residual, weight, 1e-6, pdl=step % 5 == 0)
            assert error(residual, wide) < limit
            assert error(got, want) < limit
            same_everywhere(got, total, residual)
        scores = torch.randn(world, 300, device=device, generator=generator)
        scores[:, ::3] = 1.0
        scores[:, 1::7] = 0.0
        scores[0, 1::14] = -0.0
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
