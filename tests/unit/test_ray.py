"""Batches on Ray without a cluster: what is refused, what a node's actor does, and the rows of Ray Data's batches."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from tpctl.batch import ray_cluster
from tpctl.batch.folder import JobFolder
from tpctl.batch.local import MOST_STARTS, Slot
from tpctl.batch.ray_cluster import connected, require_ray
from tpctl.batch.ray_keeper import Keeper, show
from tpctl.batch.ray_replicas import ActorProcess, RayReplicas, Room
from tpctl.errors import EngineError, UsageError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("found", [None, ModuleSpec("ray", None, is_package=True)])
def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, found: ModuleSpec | None) -> None:
    """Also where a folder is called ray, as Ray's own in /tmp."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(
        UsageError, match=r"^--ray needs Ray, which is not installed here; `pip install 'tpctl\[ray\]'`$"
    ):
        require_ray("--ray")


def test_nor_is_there_a_generator_without_it() -> None:
    code = "import sys; sys.modules['ray'] = None\n\ntry: import tpctl.ray\n"
    code += "except ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "tpctl.ray needs Ray, which is not installed here; `pip install 'tpctl[ray]'`\n"


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:99999", "ray://head:10001", ""])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="but must be auto, or HOST:PORT"), connected(address):
        pass


def said_by_probe(monkeypatch: pytest.MonkeyPatch, said: str) -> str:
    """What a cluster is refused with, of which Ray has ``said`` this."""
    done = subprocess.CompletedProcess([], 0, stdout=f"noise\n{said}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(EngineError) as caught:
        ray_cluster._probe("10.0.0.1:6379")
    return str(caught.value)


def test_why_a_cluster_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions as Ray 2.60 tells of them (its function ``check_version_info``)."""
    versions = "refused RuntimeError Version mismatch: The cluster was started with: Ray: 2.9.3 Python: 3.10.1 This "
    versions += "process on node 10.0.0.2 was started with: Ray: 2.60.0 Python: 3.11.7"
    assert said_by_probe(monkeypatch, versions) == (
        "the Ray cluster at 10.0.0.1:6379 runs Ray 2.9.3 with Python 3.10.1, but here is Ray 2.60.0 with Python "
        "3.11.7; install the same ones"
    )
    monkeypatch.setattr(ray_cluster, "version", lambda name: "2.60.0")
    other = said_by_probe(monkeypatch, "refused ValueError no such thing")
    assert other == "cannot use the Ray cluster at 10.0.0.1:6379 (Ray 2.60.0): ValueError no such thing"


def test_a_cluster_that_does_not_answer_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PATIENCE", 0.2)
    monkeypatch.setattr(ray_cluster, "_PROBE", "import time; time.sleep(600)")
    with pytest.raises(EngineError, match=r"no Ray cluster answers at 10\.0\.0\.1:6379 within 0 s"):
        ray_cluster._probe("10.0.0.1:6379")


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    found = JobFolder(tmp_path / "out")
    found.make()
    return found


def test_an_actor_that_does_not_see_the_folder_says_so(folder: JobFolder) -> None:
    host = os.uname().nodename
    for token in ("another", ""):
        code, said = Keeper().run(str(folder.root), "r", "token", 0)
        assert code == 1 and said.startswith(f"tpctl: {host} does not see the folder {folder.root} of the batch; put")
        show(folder.root, token)


def test_an_actor_keeps_a_replica_and_ends_it(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    show(folder.root, "token")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    tell = "import os; print('tpctl:', os.environ.get('OMP_NUM_THREADS'), repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    for gpus, said in ((0, "1 ''"), (1, "None '3'")):
        code, line = Keeper().run(str(folder.root), "r", "token", gpus, ("-c", tell))
        assert (code, line) == (0, f"tpctl: {said} (on {os.uname().nodename})")
    keeper, found = Keeper(), []
    sleep = ("-c", "import time; time.sleep(600)")
    thread = threading.Thread(target=lambda: found.append(keeper.run(str(folder.root), "r", "token", 0, sleep)))
    thread.start()
    while keeper._process is None:
        time.sleep(0.01)
    keeper.end()
    thread.join()
    assert found == [(-15, "")]
    keeper = Keeper()
    keeper.end()  # before there is a replica
    assert keeper.run(str(folder.root), "r", "token", 0, sleep) == (-15, "")


class Cluster:
    """Stands in for one: places what there is room for."""

    def __init__(self, cpus: dict[str, int]) -> None:
        self.cpus = cpus
        self.ends: dict[str, Future[tuple[int, str]]] = {}
        self.removed: list[int] = []

    def nodes(self) -> dict[str, dict[str, float]]:
        return {name: {"CPU": float(count)} for name, count in self.cpus.items()}


class Actor(ActorProcess):
    def kill(self) -> None:
        pass


class Replicas(RayReplicas):
    """Without Ray; actors and groups are those of ``cluster``."""

    cluster: Cluster

    def _place(self, slots: list[Slot]) -> dict[int, str]:
        free = [name for name, count in self.cluster.cpus.items() for _ in range(count // self.room.ranks)]
        return {slot.number: node for slot, node in zip(slots, free, strict=False)}

    def _remove(self, slot: Slot) -> None:
        self._placed.pop(slot.number, None)
        self.cluster.removed.append(slot.number)

    def _launch(self, slot: Slot, log: Any) -> Any:
        self.cluster.ends[slot.name] = Future()
        return Actor(None, self.cluster.ends[slot.name], self._placed[slot.number])


@pytest.fixture
def cluster(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Replicas]]:
    def make(cpus: dict[str, int], count: int, ranks: int = 1) -> Replicas:
        found = Replicas(folder.root, [Slot(n, None) for n in range(count)], "t", room=Room(ranks, "CPU", 0, 0))
        found.cluster = Cluster(cpus)
        monkeypatch.setattr("tpctl.batch.ray_replicas.nodes", found.cluster.nodes)
        monkeypatch.setattr("tpctl.batch.ray_replicas._LOOK", 0.0)
        monkeypatch.setattr("tpctl.batch.ray_replicas._SETTLED", 0.0)
        return found

    yield make


def running(replicas: Replicas) -> list[str]:
    return [slot.name for slot in replicas.slots if slot.process is not None]


def test_groups_that_wait_are_told_and_start_when_there_is_room(cluster: Callable[..., Replicas]) -> None:
    replicas = cluster({"a": 2}, 4)
    replicas.start_due()
    assert running(replicas) == ["0-t-1", "1-t-1"]
    assert replicas.pending == "2 groups pending: {CPU: 1} each"
    replicas.cluster.cpus["b"] = 1
    replicas.start_due()
    assert running(replicas) == ["0-t-1", "1-t-1", "2-t-1"] and replicas.pending == "1 group pending: {CPU: 1}"
    replicas.cluster.cpus["b"] = 2
    replicas.start_due()
    assert len(running(replicas)) == 4 and replicas.pending == ""


def test_what_no_node_has_is_told(cluster: Callable[..., Replicas]) -> None:
    replicas = cluster({"a": 2, "b": 4}, 4, ranks=8)
    replicas.start_due()
    assert not running(replicas)
    said = "4 groups pending: {CPU: 8} each, but no node has more than 4 CPUs; waiting for one that has"
    assert replicas.pending == said


def test_the_replica_of_a_node_that_is_gone_starts_elsewhere(cluster: Callable[..., Replicas]) -> None:
    replicas = cluster({"a": 1, "b": 1}, 2)
    replicas.start_due()
    for _ in range(MOST_STARTS + 2):
        name = replicas.slots[1].name
        replicas.cluster.cpus.pop("b", None)
        replicas.cluster.ends[name].set_exception(RuntimeError("the actor died"))
        (death,) = replicas.deaths({})
        assert (death.name, death.reason, death.certain, death.blameless) == (name, "its node is gone", True, True)
        assert death.again == "starts again where there is room" and not death.fatal
        replicas.start_due()
        assert running(replicas) == ["0-t-1"]
        replicas.cluster.cpus["b"] = 1
        replicas.start_due()
        assert len(running(replicas)) == 2
    assert not replicas.cluster.removed


def test_an_actor_that_dies_alone_counts_and_its_group_goes_when_it_is_given_up(
    cluster: Callable[..., Replicas],
) -> None:
    replicas = cluster({"a": 1}, 1)
    for count in range(1, MOST_STARTS + 1):
        replicas.slots[0].due = 0.0
        replicas.start_due()
        replicas.cluster.ends[f"0-t-{count}"].set_exception(RuntimeError("Worker exit detail: out of memory"))
        (death,) = replicas.deaths({})
        assert death.reason == "its actor ended: out of memory" and death.certain and not death.blameless
    assert death.again == "not started again" and replicas.all_given_up and replicas.cluster.removed == [0]
    replicas.start_due()
    assert not running(replicas) and replicas.pending == ""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ((1, "tpctl: no such model (on b)"), "no such model (on b)"),
        (ModuleNotFoundError("No module named 'tpctl'"), "tpctl is not installed on a node of the cluster; install"),
    ],
)
def test_what_another_start_would_not_mend_gives_a_replica_up(
    cluster: Callable[..., Replicas], end: Any, reason: str
) -> None:
    replicas = cluster({"a": 2}, 2)
    replicas.start_due()
    ended = replicas.cluster.ends["0-t-1"]
    ended.set_exception(end) if isinstance(end, Exception) else ended.set_result(end)
    (death,) = replicas.deaths({})
    assert death.reason.startswith(reason) and death.again == "not started again" and not death.fatal
    assert not replicas.all_given_up and replicas.cluster.removed == [0]
