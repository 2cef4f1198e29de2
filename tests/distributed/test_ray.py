"""``tpctl batch --ray`` and ``tpctl.ray.Generator`` on a Ray cluster of this machine: the short form of
``ray_cluster.py``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.batch_kills import MARK, write_prompts
from tests.distributed.ray_cluster import OPTIONS, cluster, environment, run
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.sharding.cache import ensure_sharded

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs Ray (pip install 'tpctl[ray]')")
PATIENCE = 240.0  # seconds that anything may take on a busy machine
ENV = environment("fast", f"ray-test-{os.getpid()}", 0.6)
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


def test_nodes_leave_and_come_whoever_is_killed_every_row_is_there_once(found: Any, model: str, tmp_path: Path) -> None:
    report = run(tmp_path, found, ENV, rows=1200, kills=3, seed=1, model=model)
    assert not report.wrong, "\n".join(report.wrong)
    assert sum(report.kills.values()) == 3
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


def test_the_real_engine_on_ray_and_in_ray_data(found: Any, model: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs Ray Data (pip install 'tpctl[ray]')")
    import tpctl.ray

    env = {**os.environ, MARK: ENV[MARK], **REAL}
    wanted = ("--model", model, "--kv-cache-memory", "16MiB", "--ray", found.address, "--replicas", "1")
    done = subprocess.run(command(tmp_path, 6, *wanted), env=env, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for part in sorted((tmp_path / "out").glob("part-*")) for line in part.open()]
    asked = [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()]
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        how = {"sampling": {"max_tokens": 8}, "device": "cpu", "dtype": "float32"}
        answered = ray.data.from_items([*asked, {"id": "none", "prompt": ""}]).map_batches(
            tpctl.ray.Generator,
            fn_constructor_kwargs={"model": model, "tp": 1, "kv_cache_memory": 16 << 20, "max_model_len": 256, **how},
            batch_size=4,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        by_id = {row["id"]: row for row in answered.take_all()}
    finally:
        ray.shutdown()
    assert by_id.pop("none")["error"] == "the prompt is empty"
    for row, ask in zip(rows, asked, strict=True):
        assert by_id[row["id"]] == {**ask, **row, "note": None, "error": None}
