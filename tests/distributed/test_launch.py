"""Workers start, are watched and end, whatever happens to them: with a fake worker that fails on request."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.fake_engine import (
    HERE,
    PATIENCE,
    PYTHON_PATH,
    assert_gone,
    engine_folders,
    finish,
    processes,
    request,
    start,
    surroundings,
)
from tpctl.client.engine_client import EngineClient
from tpctl.errors import EngineError, RequestError
from tpctl.launch.torchrun import Workers
from tpctl.wire.messages import Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig


class NoFork(Workers):
    """Workers whose agent finds that a forked rank could not use its GPU, as where CUDA was initialised too early."""

    def _command(self, module: str) -> list[str]:
        command = super()._command(module)
        at = command.index("tpctl.launch.agent")
        script = "import os; from tpctl.launch import agent; agent._forks_well = lambda: False; os._exit(agent.main())"
        return [*command[: at - 1], "-c", script, *command[at + 1 :]]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_what_takes_its_time_is_told_before_it_is_ready(tp_size: int, tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    told: list[str] = []
    with start(tp_size, tmp_path / "pids", "compile") as client:
        client.wait_ready(told.append)
    assert told == ["compiling 3 kernels"]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_answers_and_leaves_nothing(pids: Path, tp_size: int) -> None:
    with start(tp_size, pids) as client:
        info = client.wait_ready()
        found = processes(pids, tp_size)
        client.submit([request("a")])
        assert [token for output in finish(client) for token in output.token_ids] == [3, 4, 5]
        assert client.stats().steps == 3
        assert len(engine_folders(pids)) == 1
    assert info.tp_size == tp_size
    found_there = surroundings(pids)
    assert found_there["stdin"] == ""
    assert int(found_there["environ"]["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // tp_size)
    assert_gone(found)
    assert engine_folders(pids) == []


def test_outputs_that_arrive_before_the_stats_are_kept(pids: Path) -> None:
    with start(1, pids) as client:
        client.submit([request("a")])
        assert client.stats().steps == 3
        assert finish(client)[-1].finish_reason == "length"


def test_consumers_share_an_engine_and_its_end(pids: Path) -> None:
    with start(1, pids, "endless") as client:
        busy, left = client.mailbox(), client.mailbox()
        for mailbox in (busy, left):
            mailbox.submit([request("a")])
        left.close()
        assert busy.outputs() == [Output("a", [3])]  # and nothing of the other one's abort
        assert client.outputs(timeout=0.05) == []
        assert client.stats().steps == 0
        os.kill(processes(pids, 1)[0], signal.SIGKILL)
        for mailbox in (busy, client.mailbox()):
            with pytest.raises(EngineError, match="SIGKILL"):
                mailbox.outputs()
        with pytest.raises(EngineError, match="SIGKILL"):
            client.stats()


def test_too_long_a_prompt_is_refused_with_both_numbers(pids: Path) -> None:
    with start(1, pids) as client:
        with pytest.raises(RequestError, match=r"70 tokens.* 63 "):
            client.submit([Request("long", [1] * 70, SamplingParams())])
        with pytest.raises(RequestError, match="empty"):
            client.submit([Request("empty", [], SamplingParams())])
        client.submit([request("after")])
        assert finish(client)[-1].finish_reason == "length"


def test_abort_and_no_output_within_the_timeout(pids: Path) -> None:
    with start(1, pids, "endless") as client:
        client.submit([request("a")])
        assert client.outputs()[0].finish_reason is None
        assert client.outputs(timeout=0.05) == []
        client.abort(["a"])
        assert client.outputs()[0] == Output("a", [], "abort")


def test_ranks_that_cannot_be_forked_are_started_anew(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpctl.client.engine_client.Workers", NoFork)
    with start(2, pids) as client:
        client.wait_ready()
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes(pids, 2)[:2]]
        assert all(b"fake_worker" in command and b"agent" not in command for command in commands)
    with start(2, pids, "1:raise") as client, pytest.raises(EngineError, match=r"rank 1 .*RuntimeError"):
        client.wait_ready()
        client.outputs()


@pytest.mark.parametrize("fault", ["ignore-stop", "1:deaf"])
def test_close_ends_workers_that_do_not_listen(pids: Path, fault: str) -> None:
    with start(2, pids, fault) as client:
        client.wait_ready()
        found = processes(pids, 2)
    assert_gone(found)


SURROUNDING = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "5",
    "PET_RDZV_BACKEND": "etcd",
    "PET_NODE_RANK": "1",
    "RANK": "7",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "7",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "198.51.100.1",
    "MASTER_PORT": "1",
    "ROLE_RANK": "7",
    "ROLE_WORLD_SIZE": "16",
    "TORCHELASTIC_RUN_ID": "theirs",
    "TORCHELASTIC_USE_AGENT_STORE": "theirs",
    "TORCHELASTIC_ERROR_FILE": "/dev/full",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "x",
    "TORCH_DISTRIBUTED_DEBUG": "loud",
    "TORCH_DIST_INIT_BARRIER": "x",
    "GLOO_SOCKET_IFNAME": "eth99",
    "SLURM_PROCID": "7",
    "OMPI_COMM_WORLD_RANK": "7",
    "PMI_RANK": "7",
    "LOGLEVEL": "loud",
    "PYTHONINSPECT": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHON_EXEC": "/bin/false",
}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_launcher_around_the_command_is_not_heard(pids: Path, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SURROUNDING.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with start(tp_size, pids) as client:
        client.wait_ready()
    found = surroundings(pids)["environ"]
    assert {name for name, value in SURROUNDING.items() if found.get(name) == value} == set()
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("0", str(tp_size), str(tp_size))
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert found["NCCL_DEBUG"] == "WARN"


def test_ranks_that_cannot_reach_each_other_are_not_started(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr("socket.create_connection", unreachable)
    with pytest.raises(EngineError, match=r"127.0.0.1 cannot be reached \(Network is unreachable\); bring it up"):
        start(2, pids)
    assert engine_folders(pids) == []
    with start(1, pids) as client:  # one rank talks to nobody
        client.wait_ready()


def test_close_while_starting(pids: Path) -> None:
    with start(2, pids):
        pass
    assert engine_folders(pids) == []


def test_a_temporary_folder_with_a_long_path(pids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with start(1, pids) as client:
        client.wait_ready()
    assert list(long.iterdir()) == []


PARENT = """
import sys
from pathlib import Path
from typing import Any
from test_launch import start
with start(int(sys.argv[1]), Path(sys.argv[2])) as client:
    client.wait_ready()
    client.outputs()
"""


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_command_line_ends_the_workers(pids: Path, tp_size: int, number: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tp_size), str(pids)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stderr=subprocess.DEVNULL,
    )
    found = processes(pids, tp_size)
    parent.send_signal(number)
    parent.wait(PATIENCE)
    assert_gone(found)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_python_files_in_the_current_folder_are_not_run(
    pids: Path, tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    for name in ("queue", "torch", "safetensors", "tpctl", "tempfile", "logging"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(folder)
    env = {"PYTHONPATH": str(HERE), "FAKE_WORKER_PIDS": str(pids), "FAKE_WORKER_RECORD": "1"}
    with EngineClient(EngineConfig(pids, tp_size), module="fake_worker", env=env, start_timeout=60) as client:
        client.wait_ready()
    assert not (tmp_path / "ran").exists()


def test_what_a_killed_command_line_left_is_removed(pids: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "1", str(pids)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stderr=subprocess.DEVNULL,
    )
    found = processes(pids, 1)
    (left,) = engine_folders(pids)
    assert int((left / "parent.pid").read_text()) == parent.pid
    (pids.parent / "tpctl-notes").mkdir()
    with start(1, pids) as client:
        client.wait_ready()
        assert left.exists()  # its owner lives
    parent.kill()
    parent.wait(PATIENCE)
    assert_gone(found)
    with start(1, pids) as client:
        client.wait_ready()
        assert not left.exists()
    assert engine_folders(pids) == [pids.parent / "tpctl-notes"]


def test_logs_that_an_error_named_are_not_removed(pids: Path) -> None:
    with start(1, pids, "raise", record=True) as client, pytest.raises(EngineError):
        client.wait_ready()
    kept = engine_folders(pids)
    with start(1, pids) as client:
        client.wait_ready()
    assert engine_folders(pids) == kept
    assert len(kept) == 1


def test_no_room_for_temporary_files(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: EngineConfig, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(EngineConfig, "save", full)
        with pytest.raises(EngineError, match="cannot be made: No space left on device; set TMPDIR"):
            start(1, pids)
    assert engine_folders(pids) == []
    monkeypatch.setattr("tempfile.tempdir", str(pids / "none"))
    with pytest.raises(EngineError, match="cannot be made: No such file or directory; set TMPDIR"):
        start(1, pids)
