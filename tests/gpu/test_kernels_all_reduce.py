"""The peer all-reduce on several GPUs against its reference; the workers run this file under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET
from tpctl.kernels.collective import all_reduce
from tpctl.kernels.collective.all_reduce import PeerBuffer, PeerLayout, all_reduce_add_rms_norm_reference
from tpctl.kernels.collective.all_reduce_kernels import EMPTY
from tpctl.kernels.linear.gemv import GemvConfig, GemvScratch, small_linear

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("world", [count for count in (2, 3, 4, 8) if count <= torch.cuda.device_count()] or [2])
def test_gpus(world: int):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all-reduce ok") == world


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ends_in_turn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Two ranks of one process: what rank 1 will send is put into rank 0's buffer by hand before rank 0 runs."""
    monkeypatch.setattr(all_reduce, "_MAX_POLLS", 3)
    rows, hidden = 5, 192
    layout = PeerLayout.of(rows, hidden, dtype)
    buffers = [torch.full((layout.words(2),), EMPTY, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    ends = [PeerBuffer(rank, pointers, layout, dtype) for rank in range(2)]
    weight = torch.randn(hidden).to(DEVICE, dtype)
    for call in range(1, 6):
        runs = torch.randn(2, 1 + call % 2, rows, hidden).to(DEVICE, dtype)
        runs[:, :, 0, ::2] = 0.0
        runs[:, :, 1] = -0.0
        parts = runs.float().sum(1).to(dtype)
        sent = parts[1].contiguous().view(torch.int32)
        plane = buffers[0].view(2, 2, layout.plane_words)[call % 2, 1]
        slots = plane[: layout.first_word].view(rows, layout.row_words)[:, : sent.shape[1]]
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
        scores, ids = torch.randn(2, rows), torch.randint(0, 1000, (2, rows))
        scores[call % 2, 0], ids[call % 2, 0] = float("inf"), -2  # a row that is not finite, on one rank
        plane[layout.first_word :][:rows] = scores[1].to(DEVICE).view(torch.int32)
        plane[layout.first_word + 256 :][:rows] = ids[1].int().to(DEVICE)
        chosen = ends[0].winner(scores[0].to(DEVICE), ids[0].to(DEVICE))
        assert torch.equal(chosen.cpu(), ids.gather(0, scores.argmax(0, keepdim=True))[0])
        assert (buffers[0] == EMPTY).all()
        buffers[1].fill_(EMPTY)  # where nobody has read rank 0's
        assert not ends[0].timed_out() and not ends[1].timed_out()
    # Nobody answers, a picked token or a sum.
    alone = PeerBuffer(0, pointers, layout, dtype)
    assert alone.winner(torch.zeros(rows, device=DEVICE), torch.arange(rows, device=DEVICE)).tolist() == [-1] * rows
    ends[0].all_reduce(parts[0])
    assert ends[0].timed_out()
    monkeypatch.setattr(all_reduce, "_MAX_POLLS", 1 << 30)  # nor is waited for again
    ends[0].all_reduce(parts[0])
    buffers[1].fill_(EMPTY)
    assert ends[0].winner(torch.zeros(rows, device=DEVICE), torch.arange(rows, device=DEVICE)).tolist() == [-1] * rows
    sent = buffers[1][buffers[1] != EMPTY]  # the others are to choose -1, too: nothing beats infinity
    assert sorted(sent.tolist()) == [-1] * rows + [torch.tensor(float("inf")).view(torch.int32).item()] * rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "rows,config",
    [
        (1, GemvConfig(16, 64)),
        (1, GemvConfig(16, 64, split_k=2)),
        (5, GemvConfig(32, 32, num_stages=2, dot=True)),
        (5, GemvConfig(64, 64, split_k=2, num_stages=2, dot=True)),
    ],
)
def test_linears_send_what_they_compute(
    rows: int, config: GemvConfig, world: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """The ranks of one process, one after the other: every linear has sent before the first all-reduce runs."""
    monkeypatch.setattr(all_reduce, "_MAX_POLLS", 3)
    hidden = 90
    layout = PeerLayout.of(8, hidden, dtype)
    buffers = [torch.full((layout.words(world),), EMPTY, dtype=torch.int32, device=DEVICE) for _ in range(world)]
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    ends = [PeerBuffer(rank, pointers, layout, dtype) for rank in range(world)]
    scratch, norm = GemvScratch.allocate(DEVICE), torch.randn(hidden).to(DEVICE, dtype)
    for _ in range(3):
        given = torch.randn(world, rows, 128).to(DEVICE, dtype)
        weights = torch.randn(world, 2 * hidden, 128).to(DEVICE, dtype)
        weights[:, 4:6] = 0.0  # times a positive and a negative number: (0, -0), which stands for an empty slot
        weights[:, hidden + 4], weights[:, hidden + 5] = given[:, 0], -given[:, 0]
        parts = [
            small_linear(x, weight, scratch, activation="silu", config=config, outlet=end)
            for x, weight, end in zip(given, weights, ends, strict=True)
        ]
        assert all((part.view(torch.int32) == EMPTY).any() for part in parts)
        old = torch.randn(rows, hidden).to(DEVICE, dtype)
        wide = old.double()
        want = all_reduce_add_rms_norm_reference(torch.stack(parts).double(), wide, norm.double(), 1e-6)
        results = []
        for end, part in zip(ends, parts, strict=True):
            residual = old.clone()
            results.append((end.all_reduce_add_rms_norm(part, residual, norm, 1e-6, sent=True), residual))
        for got, residual in results:
            assert error(got, want) < (1e-6 if dtype is torch.float32 else 8e-3)
            assert error(residual, wide) < (1e-6 if dtype is torch.float32 else 8e-3)
            assert torch.equal(got, results[0][0]) and torch.equal(residual, results[0][1])
        assert all((buffer == EMPTY).all() for buffer in buffers)
    assert not any(end.timed_out() for end in ends)
    with pytest.raises(ValueError, match="9 rows"):
        ends[0].all_reduce_add_rms_norm(parts[0].new_zeros(9, hidden), old, norm, 1e-6, sent=True)
    wrong = [
        (given[0, :1], weights[0], GemvConfig(1, 64), "in pairs"),
        (given[0, :1].half(), weights[0].half(), GemvConfig(2, 64), "float16 does not fit"),
        (given[0, :1].expand(9, -1), weights[0], GemvConfig(32, 32, num_stages=2, dot=True), r"\[9, 180\]"),
        (given[0, :1], weights[0].repeat(3, 1), GemvConfig(2, 64), r"\[1, 540\]"),
    ]
    for x, weight, given_config, message in wrong:
        with pytest.raises(ValueError, match=message):
            small_linear(x, weight, scratch, config=given_config, outlet=ends[0])


@pytest.mark.skipif(not INTERPRET, reason="on GPUs two real ranks do this")
def test_three_interpreted_ranks():
    """Processes that share memory, and really wait for each other; this file's `interpreted` is what they run."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, __file__, "interpreted"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all-reduce ok") == 3


WORLD, MOST_ROWS, HIDDEN = 3, 4, 48


def interpreted() -> None:
    torch.set_num_threads(1)
    all_reduce._MAX_POLLS = 1 << 15  # some twenty seconds
    layout = PeerLayout.of(MOST_ROWS, HIDDEN, torch.float32)
    buffers = [torch.full((layout.words(WORLD),), EMPTY, dtype=torch.int32).share_memory_() for _ in range(WORLD)]
    results = torch.zeros(WORLD, 2, 9 * HIDDEN).share_memory_()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(WORLD)
    ranks = [context.Process(target=take_turns, args=(r, layout, buffers, results, barrier)) for r in range(WORLD)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        time.sleep(0.1)
        if any(process.exitcode for process in ranks):  # the others would wait for it
            for process in ranks:
                process.kill()
    sys.exit(any(process.exitcode for process in ranks))


def take_turns(
    rank: int, layout: PeerLayout, buffers: list[torch.Tensor], results: torch.Tensor, barrier: Barrier
) -> None:
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers])
    end = PeerBuffer(rank, pointers, layout, torch.float32)
    generator = torch.Generator().manual_seed(5)  # the same on every rank
    for turn in range(10):
        rows = (1, 9, 3, 4, 6)[turn % 5]  # up to three launches
        hidden = (HIDDEN, 10, 1)[turn % 3]
        parts = torch.randn(WORLD, rows, hidden, generator=generator)
        parts[:, 0] = -0.0
        parts[:, :, ::2] = -0.0
        residual, weight = torch.randn(rows, hidden, generator=generator), torch.randn(hidden, generator=generator)
        wide = residual.double()
        want = all_reduce_add_rms_norm_reference(parts.double(), wide, weight.double(), 1e-6)
        splits = 1 + (rank + turn) % WORLD  # ranks need not cut their linears alike
        given = torch.cat([parts[rank][None], torch.zeros(splits - 1, rows, hidden)])
        total = end.all_reduce(given if splits > 1 else parts[rank])
        torch.testing.assert_close(total, parts.sum(0))
        got = end.all_reduce_add_rms_norm(given, residual, weight, 1e-6)
        torch.testing.assert_close(residual, wide.float())
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)

        x, weights = (torch.randn(*shape, generator=generator) for shape in [(rows, 32), (WORLD, hidden, 32)])
        if rows <= MOST_ROWS and hidden % 2 == 0:
            old = residual.clone()
            wide = old.double()
            sums = all_reduce_add_rms_norm_reference((x.double() @ weights.double().mT), wide, weight.double(), 1e-6)
            config = GemvConfig(4, 32) if rows == 1 else GemvConfig(16, 32, num_stages=2, dot=True)
            scratch = GemvScratch.allocate(x.device)
            part = small_linear(x, weights[rank], scratch, config=config, outlet=end)
            after = end.all_reduce_add_rms_norm(part, old, weight, 1e-6, sent=True)
            torch.testing.assert_close(after, sums.float(), rtol=1e-4, atol=1e-4)

        few = min(rows, MOST_ROWS)
        scores = torch.randn(WORLD, few, generator=generator)
        ids = torch.randint(0, 1000, (WORLD, few), generator=generator)
        scores[:, 0] = 1.0
        scores[:2, -1] = torch.tensor([-0.0, 0.0])  # equal; the lowest id decides
        scores[2, -1] = float("nan")
        best = scores.nan_to_num(nan=float("-inf"))
        tied = torch.where(best == best.max(0).values, ids, 10**9).min(0).values
        chosen = end.winner(scores[rank], ids[rank])
        assert torch.equal(chosen, tied)

        results[rank, 0, : total.numel()] = total.flatten()
        results[rank, 1, : got.numel()] = got.flatten()
        barrier.wait()
        assert all(torch.equal(other.view(torch.int32), results[0].view(torch.int32)) for other in results)
        barrier.wait()
    assert not end.timed_out()
    assert (buffers[rank] == EMPTY).all()
    print("all-reduce ok", flush=True)


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
        # Sent by the linear, which other kernels follow early: the same bits as sent by the all-reduce.
        scratch = GemvScratch.allocate(device)
        for step in range(60):
            rows, hidden = (1, 3, 16)[step % 3], (4096, 1024)[step % 2]
            x = torch.randn(rows, 512, device=device, generator=generator).to(dtype)
            weights = torch.randn(world, hidden, 512, device=device, generator=generator).to(dtype)
            weights[:, ::3] = 0.0
            weight = torch.randn(hidden, device=device, generator=generator).to(dtype)
            old = torch.randn(rows, hidden, device=device, generator=generator).to(dtype)
            results = []
            for sent in (False, True):
                residual = old.clone()
                got = add_thrice(peers, sent, x, weights[rank], scratch, residual, weight)
                results.append((got, residual))
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
            same_everywhere(*results[1])
        # The same captured; the numbers of the calls go on from replay to replay.
        residual = old.clone()
        add_thrice(peers, True, x, weights[rank], scratch, residual, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = add_thrice(peers, True, x, weights[rank], scratch, residual, weight)
        for _ in range(50):
            residual.copy_(old)
            graph.replay()
            assert torch.equal(out, results[1][0]) and torch.equal(residual, results[1][1])
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


def add_thrice(
    peers: PeerBuffer,
    sent: bool,
    x: torch.Tensor,
    linear: torch.Tensor,
    scratch: GemvScratch,
    residual: torch.Tensor,
    norm: torch.Tensor,
) -> torch.Tensor:
    """The sum of every rank's linear of x, three times added to the residual; returns it normalised."""
    for _ in range(3):
        part = small_linear(x, linear, scratch, outlet=peers if sent else None, pdl=True)
        out = peers.all_reduce_add_rms_norm(part, residual, norm, 1e-6, sent=sent, pdl=True)
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def same_everywhere(*tensors: torch.Tensor) -> None:
    import torch.distributed as dist

    for tensor in tensors:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        assert all(torch.equal(gathered[0], other) for other in gathered)


if __name__ == "__main__":
    interpreted() if sys.argv[1:] else work()
