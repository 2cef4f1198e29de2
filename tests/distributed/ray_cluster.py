"""A batch on a Ray cluster of this machine, which loses a node and gets another one, with random kills besides.

    python -m tests.distributed.ray_cluster [--rows 100000] [--kills 12] [--seed 0] [--engine fast|real] [--model demo]

The cluster (the ``Cluster`` that Ray is tested with) has a head without CPUs and two nodes of two each, so there is
room for four replicas of one rank. When about a third of the rows are there a node is removed, and at about half
another one is added. A kill is SIGKILL to a replica, its rank, its actor, or the coordinator, which is then started
again with ``--resume``. Exits with 1 unless every id is there exactly once, in order, with the content of an
undisturbed run on this machine without Ray. Needs Ray, 2.5 GB of memory, and for the fast engine (``fast_worker.py``)
no more of the model than its tokenizer.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.batch_kills import MARK, Batch, Report, compare, conclude, kill_and_go_on, write_prompts
from tests.processes import with_variable
from tpctl.batch.folder import JobFolder, load

LIMIT = 3600.0
STORE = 80 << 20  # bytes of a node's object store, the least that Ray takes; nothing lies there
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "256", "--max-tokens", "8")


@contextmanager
def cluster(*cpus: int, **env: str) -> Iterator[Any]:
    """A cluster with a head without CPUs, and nodes with so many. Its nodes' environment has ``env``, too.

    Everything that it starts is ended, and its folder removed.
    """
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # not TMPDIR: paths of sockets must be short
    mine = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
    with mock.patch.dict(os.environ, {**mine, "TPCTL_RAY_TEST": str(folder), **env}):
        head = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        found = None
        try:
            found = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
            for count in cpus:
                add(found, count)
            yield found
        finally:
            ray.shutdown()  # of a driver in this process
            if found is not None:
                found.shutdown()
            for pid in with_variable(f"TPCTL_RAY_TEST={folder}"):
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def add(found: Any, cpus: int) -> Any:
    """A new node."""
    return patiently(lambda: found.add_node(num_cpus=cpus, num_gpus=0, object_store_memory=STORE))


def patiently(start: Callable[[], Any], tries: int = 3) -> Any:
    """Ray gives a node 30 s to start, which is too little on a machine that does much else."""
    for left in reversed(range(tries)):
        try:
            return start()
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
    raise AssertionError


def victims(mark: str) -> dict[str, list[int]]:
    """The batch's live processes by kind. Ray's own are left alone, but for the actors."""
    found: dict[str, list[int]] = {"coordinator": [], "replica": [], "rank": [], "actor": []}
    for pid in with_variable(f"{MARK}={mark}"):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        for kind, sign in (
            ("coordinator", " tpctl batch "),
            ("replica", " tpctl replica "),
            ("rank", "fast_worker"),
            ("rank", "engine.worker"),
            ("actor", "ray::Keeper"),
        ):
            if sign in command and "default_worker" not in command:
                found[kind].append(pid)
                break
    return found


def environment(engine: str, mark: str, delay: float = 0.0) -> dict[str, str]:
    """What a cluster's nodes and a batch's coordinator are started with, besides."""
    found = {MARK: mark, "FAST_WORKER_DELAY": str(delay), "OMP_NUM_THREADS": "1"}
    return found | ({"TPCTL_WORKER": "tests.distributed.fast_worker"} if engine == "fast" else {})


def undisturbed(scratch: Path, prompts: Path, options: tuple[str, ...], env: dict[str, str]) -> float:
    """Answer ``prompts`` into ``scratch / "calm"`` without Ray; seconds."""
    began = time.monotonic()
    code = (
        Batch(prompts, scratch / "calm", 2, options, {**os.environ, **env, "FAST_WORKER_DELAY": "0"})
        .start()
        .wait(LIMIT)
    )
    if code != 0:
        said = (scratch / "calm.log").read_text()[-500:]
        raise RuntimeError(f"the undisturbed run ended with {code}: {said}")
    return time.monotonic() - began


def run(
    scratch: Path,
    found: Any,
    env: dict[str, str],
    *,
    rows: int,
    kills: int = 0,
    seed: int = 0,
    model: str = "demo",
    events: Sequence[tuple[float, Callable[[], object]]] = (),
) -> Report:
    """An undisturbed run, and one on a cluster of two nodes with two CPUs, in ``scratch``.

    Args:
        env: ``environment``, which the cluster's nodes have, too.
        events: what happens besides, as ``kill_and_go_on`` takes it.
    """
    report = Report(rows)
    prompts = write_prompts(scratch / "prompts.jsonl", rows)
    options = (*OPTIONS, "--model", model, "--kv-cache-memory", "16MiB")
    report.undisturbed = undisturbed(scratch, prompts, options, env)
    began = time.monotonic()
    ours = {**os.environ, **env}
    stormy = Batch(prompts, scratch / "stormy", 4, (*options, "--ray", found.address), ours, victims)
    kill_and_go_on(stormy, env[MARK], rows, kills, random.Random(seed), report, events)
    report.seconds = time.monotonic() - began
    report.wrong += compare(scratch / "stormy", scratch / "calm", rows)
    stats = load(JobFolder(scratch / "stormy").stats) or {}
    report.computed, report.needed = stats.get("computed_tokens", 0), stats.get("completion_tokens", 0)
    if left := _left(env[MARK]):
        report.wrong.append(f"{len(left)} processes are left")
    if report.wrong:
        report.wrong.append((scratch / "stormy.log").read_text()[-2000:])
    return report


def _left(mark: str, patience: float = 20.0) -> list[int]:
    """The batch's processes that live, after some time in which Ray may end its actors."""
    deadline = time.monotonic() + patience
    while (left := [pid for pids in victims(mark).values() for pid in pids]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("fast", "real"), default="fast")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that the fast engine takes for a group")
    parser.add_argument("--log", action="store_true", help="show what the coordinators said")
    args = parser.parse_args()
    env = environment(args.engine, f"ray-{os.getpid()}-{args.seed}", args.delay)
    with tempfile.TemporaryDirectory(prefix="ray-cluster-") as scratch, cluster(2, 2, **env) as found:
        leaving = list(found.worker_nodes)[-1]
        report = run(
            Path(scratch),
            found,
            env,
            rows=args.rows,
            kills=args.kills,
            seed=args.seed,
            model=args.model,
            events=[(0.3, lambda: found.remove_node(leaving)), (0.5, lambda: add(found, 2))],
        )
        if args.log:
            print(Path(scratch, "stormy.log").read_text())
    conclude(report, "a node removed, one added, and ")


if __name__ == "__main__":
    main()
