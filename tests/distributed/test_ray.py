"""``tpctl batch --ray`` on a Ray cluster of this machine: the short form of ``ray_cluster.py``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.batch_kills import MARK, write_prompts
from tests.distributed.ray_cluster import OPTIONS, add, cluster, environment, run, victims
from tpctl import LLM, SamplingParams
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.sharding.cache import ensure_sharded

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs Ray (pip install 'tpctl[ray]')")
PATIENCE = 240.0  # seconds that anything may take on a busy machine
PAUSE = Path(tempfile.gettempdir(), f"ray-test-{os.getpid()}.pause")
ENV = {**environment("fast", f"ray-test-{os.getpid()}", 0.6), "FAST_WORKER_PAUSE": str(PAUSE)}
REAL = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"TPCTL_WORKER": ""}}})}


@pytest.fixture(scope="module")
def found() -> Iterator[Any]:
    with cluster(2, 2, **ENV) as one:
        yield one


@pytest.fixture(scope="module")
def model(demo: ResolvedSource) -> str:
    ensure_sharded(demo, 1)
    return str(demo.folder)


def command(tmp_path: Path, rows: int, *more: str) -> list[str]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    out = f"{tmp_path / 'out'}/"
    return [sys.executable, "-m", "tpctl", "batch", str(prompts), "-o", out, *OPTIONS, *more]


def test_a_node_leaves_and_one_comes_and_every_row_is_there_once(found: Any, model: str, tmp_path: Path) -> None:
    """Engines wait while something happens, so that however busy the machine is the batch does not end before."""
    leaving = list(found.worker_nodes)[-1]

    def kill(kind: str) -> None:
        pids = victims(ENV[MARK])[kind]
        if pids:  # none: the replica that was there is only about to start again
            os.kill(pids[0], signal.SIGKILL)

    def meanwhile(act: Callable[[], object]) -> Callable[[], None]:
        def act_paused() -> None:
            PAUSE.touch()
            act()
            PAUSE.unlink()

        return act_paused

    acts = (lambda: kill("replica"), lambda: found.remove_node(leaving), lambda: kill("actor"), lambda: add(found, 2))
    events = [(share, meanwhile(act)) for share, act in zip((0.1, 0.3, 0.5, 0.6), acts, strict=True)]
    report = run(tmp_path, found, ENV, rows=1000, model=model, events=events)
    assert not report.wrong, "\n".join(report.wrong)
    said = (tmp_path / "stormy.log").read_text()
    assert "its node is gone; starts again where there is room" in said
    assert "Traceback" not in said


def test_what_no_node_has_is_waited_for_and_told(found: Any, model: str, tmp_path: Path) -> None:
    wanted = ("--model", model, "--ray", found.address, "--replicas", "4", "--device", "cuda")
    env = {**os.environ, **ENV}
    process = subprocess.Popen(command(tmp_path, 10, *wanted), env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        said = "4 groups pending: {GPU: 1} each, but no node has more than 0 GPUs; waiting for one that has"
        assert line == f"0 of 4 replicas, {said}\n"
        status = [sys.executable, "-m", "tpctl", "batch", "status", str(tmp_path / "out")]
        deadline = time.monotonic() + PATIENCE
        while said not in (shown := subprocess.run(status, capture_output=True, text=True).stdout):
            assert time.monotonic() < deadline, shown
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()


def test_another_version_of_ray_is_one_line(found: Any, tmp_path: Path) -> None:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    ray.init(address=found.address, log_to_driver=False)
    try:
        before = _internal_kv_get("CLUSTER_METADATA", namespace="cluster")
        assert before is not None
        _internal_kv_put(
            "CLUSTER_METADATA", json.dumps({**json.loads(before), "ray_version": "2.9.3"}), namespace="cluster"
        )
        done = subprocess.run(command(tmp_path, 10, "--ray", found.address), capture_output=True, text=True)
        _internal_kv_put("CLUSTER_METADATA", before, namespace="cluster")
    finally:
        ray.shutdown()
    assert done.returncode == 1 and done.stderr.startswith(f"tpctl: the Ray cluster at {found.address} runs Ray 2.9.3")
    assert done.stderr.count("\n") == 1


def test_the_real_engine(found: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("--model", model, "--kv-cache-memory", "16MiB", "--ray", found.address, "--replicas", "1")
    env = {**os.environ, MARK: ENV[MARK], **REAL}
    done = subprocess.run(command(tmp_path, 6, *wanted), env=env, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for part in sorted((tmp_path / "out").glob("part-*")) for line in part.open()]
    asked = [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()]
    monkeypatch.delenv("TPCTL_WORKER")  # which the cluster has set for all that is started here
    with LLM(model, device="cpu", dtype="float32", kv_cache_memory=16 << 20, max_model_len=256) as llm:
        answers = llm.generate([line["prompt"] for line in asked], SamplingParams(max_tokens=8))
    assert [(row["id"], row["text"]) for row in rows] == [
        (line["id"], answer.text) for line, answer in zip(asked, answers, strict=True)
    ]


def test_tables_on_a_cluster(found: Any, model: str, tmp_path: Path) -> None:
    numbers = range(120)
    rows = {"q": [f"line {n}" for n in numbers], "key": [f"k{n}" for n in numbers], "raw": [b"x"] * len(numbers)}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet", row_group_size=50)
    wanted = ["--model", model, "--ray", found.address, "--replicas", "2", "--prompt-column", "q"]
    wanted += ["--id-column", "key", "--keep-columns", "raw", "--step-timeout", "60", "--part-rows", "25"]
    words = command(tmp_path, 1, *wanted)
    words[4:7] = [str(tmp_path / "in.parquet"), "-o", str(tmp_path / "whole.parquet")]
    done = subprocess.run(words, env={**os.environ, **ENV}, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    whole = pq.read_table(tmp_path / "whole.parquet")
    assert whole["id"].to_pylist() == rows["key"] and whole["raw"].to_pylist() == rows["raw"]
    assert whole["error"].null_count == len(numbers) and not (tmp_path / "whole.parquet.parts").exists()
