"""The programs of examples/, run as a reader runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest

from tests.distributed.server_process import PATIENCE, ServerProcess
from tpctl.checkpoint.sources import ResolvedSource

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals()} & names


def test_split_a_linear() -> None:
    done = run("split_a_linear.py", "--tp", "3")
    assert done.returncode == 0, done.stderr
    [difference] = re.findall(r"largest difference to the whole layer: (\S+)", done.stdout)
    assert float(difference) < 1e-5
    assert len(re.findall(r"^rank \d: query heads", done.stdout, re.MULTILINE)) == 3


def test_engine_client(demo: ResolvedSource) -> None:
    model = os.environ.get("TPCTL_TEST_MODEL")
    done = run("engine_client.py", *(("--model", model) if model else ()))
    assert done.returncode == 0, done.stderr
    assert re.search("[A-Za-z]{3}", done.stdout)


def test_ray_data(demo: ResolvedSource) -> None:
    pytest.importorskip("ray", reason="needs Ray (pip install 'tpctl[ray]')")
    from tests.distributed.ray_cluster import cluster

    with cluster(3) as found:
        done = run("ray_data.py", "--model", str(demo.folder), "--ray", found.address)
    assert done.returncode == 0, done.stderr
    paris, three, empty, water = (json.loads(line) for line in done.stdout.splitlines())
    assert "Paris" in paris["text"] and paris["number"] == 0 and paris["error"] is None
    assert (empty["error"], empty["text"], empty["finish_reason"]) == ("the prompt is empty", None, "error")
    assert all(0 < row["completion_tokens"] <= 12 for row in (paris, three, water))


def test_datatrove_server(demo: ResolvedSource) -> None:
    """As datatrove's CustomServer starts it."""
    options = ["--device=cpu", "--max-model-len=512", "--served-model-name=demo"]
    server = ServerProcess(f"--model={demo.folder}", *options, program=(str(EXAMPLES / "datatrove_server.py"),))
    with server:
        models = httpx2.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"]
        assert [model["id"] for model in models] == ["demo"] and models[0]["max_model_len"] == 512
    assert server.process.returncode == 0


def check_vllm(name: str, folder: Path, option: str, proven: str, failed: str) -> None:
    """Where vLLM is not installed it is asked all the same, and what it said is shown."""
    done = run(name, str(folder), "--tp", "1", option, sys.executable)
    if find_spec("vllm"):
        assert done.returncode == 0, done.stderr
        assert proven in done.stdout
    else:
        assert done.returncode == 1
        assert done.stderr.startswith(f"{failed} on {folder} at tp 1:")
        assert "No module named 'vllm'" in done.stderr


def test_vllm_sharded_state(demo: ResolvedSource) -> None:
    proven = "tp 1, from the shards: the same tokens"
    check_vllm("vllm_sharded_state.py", demo.folder, "--vllm", proven, "vLLM failed")


def test_engine_state(demo: ResolvedSource) -> None:
    check_vllm("engine_state.py", demo.folder, "--python", "tp 1, rank 0: the same", "vllm failed")
