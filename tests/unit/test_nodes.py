"""One engine over several hosts: where they meet, what they agree on, and how each sees the others' end."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpctl import shared_memory
from tpctl.engine import lost_hosts
from tpctl.engine.lost_hosts import Peer, watch
from tpctl.engine.runners import agreement
from tpctl.errors import EngineError, UsageError
from tpctl.launch.environment import worker_environment
from tpctl.launch.failure import read_error_file
from tpctl.launch.nodes import ONE_HOST, Nodes, find_nodes, socket_interface, split_endpoint
from tpctl.wire.settings import EngineConfig

SRUN = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
}


def test_hosts_are_named_or_slurm_names_them() -> None:
    assert find_nodes(None, None, None, SRUN) == find_nodes(1, None, None, {}) == ONE_HOST
    assert find_nodes(2, 1, "gpu1:29500", {}) == Nodes(2, 1, "gpu1:29500")
    assert find_nodes(2, None, None, SRUN) == Nodes(2, 1, "gpu03:15192")
    assert find_nodes(2, 0, "a:1", SRUN) == Nodes(2, 0, "a:1")
    assert find_nodes(2, None, None, {**SRUN, "SLURM_STEP_NODELIST": "a,b"}).endpoint == "a:15192"


@pytest.mark.parametrize(
    ("count", "rank", "endpoint", "env", "said"),
    [
        (None, 0, None, {}, "--node-rank is for a model over several hosts"),
        (1, None, "a:1", {}, "--rdzv-endpoint is for a model over several hosts"),
        (2, None, "a:1", {}, "--nnodes 2 needs --node-rank"),
        (3, None, None, SRUN, "--nnodes 3 needs --node-rank"),  # two tasks are not three hosts
        (2, 2, "a:1", {}, "--node-rank is 2, but with --nnodes 2 must be from 0 to 1"),
        (2, 0, "a", {}, "--rdzv-endpoint is a, but must be HOST:PORT"),
        (2, 0, "a:70000", {}, "a port from 1 to 65535"),
        (2, 0, "-x:1 y:2", {}, "must be HOST:PORT"),
    ],
)
def test_what_is_missing_is_named(
    count: int | None, rank: int | None, endpoint: str | None, env: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        find_nodes(count, rank, endpoint, env)


def test_every_host_has_as_many_ranks() -> None:
    assert [list(Nodes(2, rank, "a:1").ranks_here(4)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert list(ONE_HOST.ranks_here(3)) == [0, 1, 2]
    with pytest.raises(UsageError, match=r"--tp 3 cannot be divided among --nnodes 2.*use --tp 4"):
        Nodes(2, 0, "a:1").ranks_here(3)


def test_a_place_that_is_none_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineError, match="of this host, the first, cannot be opened"):
            Nodes(2, 0, endpoint).check_endpoint()
        Nodes(2, 1, endpoint).check_endpoint()
    with pytest.raises(EngineError, match=r"no-such-host\.invalid is not found here"):
        Nodes(2, 1, "no-such-host.invalid:1").check_endpoint()
    assert split_endpoint("[::1]:5") == ("::1", 5)


def test_gloo_listens_where_the_first_host_is_reached() -> None:
    assert socket_interface("127.0.0.1:29500") == "lo"
    hosts = Nodes(2, 1, "127.0.0.1:29500")
    env = worker_environment({"GLOO_SOCKET_IFNAME": "eth7"}, {}, 2, Path("/run"), hosts)
    assert env["GLOO_SOCKET_IFNAME"] == "eth7" and "RANK" not in env
    assert worker_environment({}, {}, 2, Path("/run"), hosts)["GLOO_SOCKET_IFNAME"] == "lo"
    alone = worker_environment({"GLOO_SOCKET_IFNAME": "eth7"}, {}, 2, Path("/run"))
    assert alone["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> threading.Event:
    """Set when a rank of host 0 would end its process."""
    found = threading.Event()
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(lost_hosts, "_GRACE", 0.05)
    monkeypatch.setattr(lost_hosts.os, "_exit", lambda code: found.set())
    return found


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        return server.accept()[0], other


@pytest.mark.parametrize(("rank", "who"), [(2, "rank 2"), (0, "the first host")])
def test_a_rank_of_another_host_that_ends_is_missed(left: threading.Event, tmp_path: Path, rank: int, who: str) -> None:
    one, other = connection()
    watch(one, Peer(rank, 1, "far"), threading.Event())
    other.sendall(b"unread")
    assert not left.wait(0.2)
    other.close()
    assert left.wait(30)
    said = f"EngineError: {who} (far) is gone; what happened is said there"
    assert read_error_file(tmp_path / "error.json") == said


def test_one_that_ends_because_all_do_is_not_nor_is_one_of_this_host(left: threading.Event) -> None:
    for peer, ends in ((Peer(2, 1, "far"), True), (Peer(1, 0, "here"), False)):
        one, other = connection()
        ending = threading.Event()
        watch(one, peer, ending)
        if ends:
            ending.set()
        other.close()
        assert not left.wait(0.3)


def group(said: list[str], alike: bool = True, size: int = 4) -> Any:
    """A rank that hears ``said`` from the first host, or is its rank 0."""
    return SimpleNamespace(
        size=size,
        broadcast_text=lambda text: said[0] if said else said.append(text) or text,
        minimum=lambda value: min(value, int(alike)),
    )


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path) -> Any:
        return SimpleNamespace(source=SimpleNamespace(files=[folder.name]), dtype="float32", expert_parallel=1)

    monkeypatch.setattr(agreement, "Manifest", SimpleNamespace(load=load))


@pytest.mark.usefixtures("described")
def test_the_first_hosts_settings_are_everybodys() -> None:
    said: list[str] = []
    first = EngineConfig(Path("a/m"), 4, max_num_seqs=7, scheduling_policy="makespan", engines_on_host=2)
    assert agreement.agree(group(said), first) == first
    here = agreement.agree(group(said), EngineConfig(Path("b/m"), 4, Path("c"), max_num_seqs=9))
    assert (here.max_num_seqs, here.scheduling_policy, here.engines_on_host) == (7, "makespan", 1)
    assert (here.shard_dir, here.model_dir) == (Path("b/m"), Path("c"))


@pytest.mark.usefixtures("described")
def test_another_model_or_number_of_ranks_is_refused_on_all_hosts() -> None:
    said: list[str] = []
    with pytest.raises(UsageError, match="another host runs another engine than this"):
        agreement.agree(group(said, alike=False), EngineConfig(Path("m"), 4))
    with pytest.raises(UsageError, match=r"runs another engine than the first host: model \w+ \(there \w+\)"):
        agreement.agree(group(said), EngineConfig(Path("n"), 4))
    with pytest.raises(UsageError, match=r"--tp 2 \(there 4\)"):
        agreement.agree(group(said), EngineConfig(Path("m"), 2))
    with pytest.raises(UsageError, match="3 ranks have met, but --tp is 4"):
        agreement.agree(group(said, size=3), EngineConfig(Path("m"), 4))


def test_memory_that_is_not_the_first_ranks_is_not_shared(tmp_path: Path) -> None:
    """A path under /proc may lead to something on another host, too."""
    if not shared_memory.is_supported():
        pytest.skip("ranks share memory on Linux with x86-64 only")
    size = shared_memory.required_bytes(2)
    (tmp_path / "other").write_bytes(bytes(size))
    for told, shared in ((f"{tmp_path / 'other'} {'00' * 16}", True), (f"{tmp_path / 'other'} {'11' * 16}", False)):
        found = shared_memory.connect(1, 2, 1.0, lambda text, told=told: told, lambda value: value)  # type: ignore[misc]
        assert (found is not None) == shared
