"""Batches over parts, as they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.batch_kills import write_prompts
from tests.processes import with_variable
from tpctl.batch.folder import JobFolder, names
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.sharding.cache import ensure_sharded

PATIENCE = 240.0  # seconds that anything may take on a busy machine

OPTIONS = ("--device", "cpu", "--max-model-len", "256", "--max-tokens", "8")


@pytest.fixture(scope="module")
def model(demo: ResolvedSource) -> str:
    ensure_sharded(demo, 1)
    return str(demo.folder)


class Runner:
    """Calls of ``tpctl batch`` for one output."""

    def __init__(self, model: str, prompts: Path, out: Path, env: dict[str, str]) -> None:
        self.command = [sys.executable, "-m", "tpctl", "batch", str(prompts), "-o", f"{out}/", "--model", model]
        self.prompts = prompts
        self.out = out
        self.folder = JobFolder(out)
        self.env = {**os.environ, "TPCTL_WORKER": "tests.distributed.fast_worker", "TPCTL_BATCH_TEST": str(out), **env}

    def __call__(self, *more: str, shell: str = "") -> subprocess.CompletedProcess[str]:
        command = [*self.command, *OPTIONS, *more]
        if shell:
            command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE)

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.command, *OPTIONS, *more], env=self.env, stderr=subprocess.PIPE, text=True)

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "tpctl", "batch", "status", str(self.out), "--json"]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, timeout=PATIENCE).stdout)
        return found

    def at_work(self) -> bool:
        """Whether a replica has taken lines."""
        return bool(names(self.folder.leases))

    def rows(self) -> list[dict[str, Any]]:
        parts = sorted(self.folder.parts().items())
        return [json.loads(line) for _, part in parts for line in part.open()]

    def left(self) -> list[int]:
        return with_variable(f"TPCTL_BATCH_TEST={self.out}")


Make = Callable[..., Runner]


@pytest.fixture
def batch(model: str, tmp_path: Path) -> Make:
    def make(rows: int, **env: str) -> Runner:
        return Runner(model, write_prompts(tmp_path / "prompts.jsonl", rows), tmp_path / "out", env)

    return make


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def said(result: subprocess.CompletedProcess[str] | str) -> str:
    """The one line of an error."""
    text = result if isinstance(result, str) else result.stderr
    (line,) = [line for line in text.splitlines() if line.startswith("tpctl: ")]
    assert "Traceback" not in text
    return line


def parts(run: Runner) -> list[Any]:
    from tpctl.batch.folder import json_lines
    from tpctl.batch.formats.place import Part

    return [Part.from_json(value) for value in json_lines(run.folder.index)]
