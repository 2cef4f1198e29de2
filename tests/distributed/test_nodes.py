"""One model over two "hosts" of the loopback, each a command of its own, which know of each other by torchrun alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from tests.distributed.server_process import ServerProcess
from tests.processes import with_variable
from tpctl.checkpoint.sources import resolve
from tpctl.sharding.cache import ensure_sharded

pytestmark = pytest.mark.slow
PATIENCE = 240.0  # seconds that anything may take on a busy machine
SECONDS = 60.0  # in which a host ends when another one has; a few, on a machine that does nothing else
MARK = "TPCTL_NODES_TEST"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class Hosts:
    """Commands that differ only in their node rank."""

    def __init__(self, model: str, folder: Path, tp: int) -> None:
        self.folder = folder
        self.mark = f"{MARK}={folder}-{tp}"
        self.env = {**os.environ, MARK: f"{folder}-{tp}", "OMP_NUM_THREADS": "1"}
        self.common = ["--tp", str(tp), "--device", "cpu", "--dtype", "float32", "--max-model-len", "256"]
        self.common += ["--model", model, "--kv-cache-memory", "16MiB"]
        self.where = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]

    def batch(self, out: str, *more: str) -> list[str]:
        prompts = str(self.folder / "prompts.jsonl")
        return [sys.executable, "-m", "tpctl", "batch", prompts, "-o", str(self.folder / out), *self.common, *more]

    def start(self, rank: int, *more: str) -> subprocess.Popen[str]:
        command = self.batch("two.jsonl", *self.where, "--node-rank", str(rank), *more)
        return subprocess.Popen(command, env=self.env, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def left(self, patience: float) -> list[int]:
        deadline = time.monotonic() + patience
        while (found := with_variable(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def model(small: str) -> str:
    for tp in (2, 4):
        ensure_sharded(resolve(small), tp)
    return small


def write_prompts(folder: Path, rows: int) -> None:
    lines = [json.dumps({"id": number, "prompt": f"Once upon a time {number}"}) for number in range(rows)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


@pytest.mark.daily(2)
@pytest.mark.parametrize("tp", [2, 4])
def test_two_hosts_say_what_one_says(model: str, tmp_path: Path, tp: int) -> None:
    hosts = Hosts(model, tmp_path, tp)
    write_prompts(tmp_path, 3)
    subprocess.run(hosts.batch("one.jsonl", "--max-tokens", "16"), env=hosts.env, check=True, timeout=PATIENCE)
    second = hosts.start(1)  # with other settings, of which the first host's hold
    first = hosts.start(0, "--max-tokens", "16", "--max-num-seqs", "8")
    _, said = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, said
    _, said = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    ranks = "rank 1" if tp == 2 else "ranks 2 to 3"
    assert f"host 2 of 2: {ranks} of {tp}; all meet at 127.0.0.1:" in said
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not hosts.left(SECONDS)


def test_a_server_over_two_hosts(model: str, tmp_path: Path) -> None:
    hosts = Hosts(model, tmp_path, 2)
    options = [model, *hosts.common[: hosts.common.index("--model")], "--kv-cache-memory", "16MiB", *hosts.where]
    command = [sys.executable, "-m", "tpctl", "serve", *options, "--node-rank", "1"]
    env = {MARK: hosts.env[MARK], "OMP_NUM_THREADS": "1"}
    second = subprocess.Popen(command, env=hosts.env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        with ServerProcess(*options, "--node-rank", "0", **env) as server:
            body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()
            assert answer["usage"]["completion_tokens"] == 8
        assert server.process.returncode == 0 and any("host 1 of 2: rank 0 of 2" in line for line in server.said)
        _, said = second.communicate(timeout=PATIENCE)
    finally:
        second.kill()
    assert second.returncode == 0 and "host 2 of 2: rank 1 of 2" in said and "Uvicorn" not in said
    assert not hosts.left(SECONDS)


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("dies", "said"), [(1, "tpctl: rank 1 ("), (0, "tpctl: the first host (")], ids=["second", "first"]
)
def test_the_death_of_a_host_ends_the_other_with_one_line(model: str, tmp_path: Path, dies: int, said: str) -> None:
    hosts = Hosts(model, tmp_path, 2)
    write_prompts(tmp_path, 2000)
    running = [hosts.start(rank, "--max-tokens", "20", "--max-num-seqs", "4") for rank in range(2)]
    try:
        deadline = time.monotonic() + PATIENCE
        partial = tmp_path / "two.jsonl.partial"
        while not partial.exists() or partial.read_bytes().count(b'"text"') == 0:
            assert time.monotonic() < deadline and all(process.poll() is None for process in running)
            time.sleep(0.1)
        began = time.monotonic()
        running[dies].send_signal(signal.SIGKILL)
        _, err = running[1 - dies].communicate(timeout=PATIENCE)
        took = time.monotonic() - began
    finally:
        for process in running:
            process.kill()
    assert running[1 - dies].returncode == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("tpctl: ")]
    assert line.startswith(said) and "is gone; what happened is said there" in line
    assert "Traceback" not in err and took < SECONDS, took
    assert not hosts.left(SECONDS)
