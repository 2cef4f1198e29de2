"""Collectives over shared memory, between real processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

import pytest
import torch

from tpctl.errors import EngineError
from tpctl.shared_memory import SharedMemory, connect, required_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Linux on x86-64"),
]
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("size", "rounds"), [(2, 2000), (3, 800), (9, 100)])
def test_collectives_of_processes(size: int, rounds: int) -> None:
    command = [sys.executable, "-m", "tests.distributed.collectives", str(size), str(rounds), "4000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is done") == size


def test_a_rank_that_never_comes() -> None:
    lonely = SharedMemory(mmap(-1, required_bytes(3)), rank=1, size=3, timeout=0.05)
    with pytest.raises(EngineError, match=r"rank 1 waited 0\.05 s for rank 0"):
        lonely.all_reduce(torch.ones(4))


@pytest.mark.parametrize(("spin", "yields"), [(True, 300), (False, 0)])
def test_a_rank_that_may_not_spin_sleeps_at_once(spin: bool, yields: int, monkeypatch: pytest.MonkeyPatch) -> None:
    yielded: list[int] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yielded.append(1))
    lonely = SharedMemory(mmap(-1, required_bytes(2)), rank=0, size=2, timeout=0.01)
    lonely.let_spin(False)
    lonely.let_spin(spin)
    with pytest.raises(EngineError):
        lonely.all_reduce(torch.ones(4))
    assert len(yielded) == yields


class _Talk:
    """What ``connect`` needs of a process group, between threads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.text = ""
        self.values: list[int] = []

    def broadcast(self, rank: int, text: str) -> str:
        if rank == 0:
            self.text = text
        self.barrier.wait()
        return self.text

    def minimum(self, value: int) -> int:
        self.values.append(value)
        self.barrier.wait()
        return min(self.values)


def _connect(size: int, text: str | None = None) -> list[SharedMemory | None]:
    talk = _Talk(size)

    def one(rank: int) -> SharedMemory | None:
        return connect(rank, size, 60, lambda own: talk.broadcast(rank, text or own), talk.minimum)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_connect_leaves_no_descriptor_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    ends = _connect(3)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3  # one that each mapping keeps for itself
    with ThreadPoolExecutor(3) as pool:
        sums = list(pool.map(lambda end: end.all_reduce(torch.full((5,), float(end.rank))), ends))
    assert all(found.tolist() == [3.0] * 5 for found in sums)


def test_all_decline_if_one_rank_cannot_map() -> None:
    assert _connect(2, "/proc/1/fd/none") == [None, None]


def test_all_decline_on_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert _connect(2) == [None, None]
