"""Engines of ``fake_worker.py``: started, looked at, and gone in the end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tpctl.client.engine_client import EngineClient
from tpctl.wire.messages import Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

HERE = Path(__file__).parent
PYTHON_PATH = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
PATIENCE = 60.0  # seconds that anything may take on a busy machine


def start(tp_size: int, pids: Path, fault: str = "", *, record: bool = False, timeout: float = 60) -> EngineClient:
    env = {"PYTHONPATH": PYTHON_PATH, "FAKE_WORKER": fault, "FAKE_WORKER_PIDS": str(pids)}
    if record:
        env["FAKE_WORKER_RECORD"] = "1"
    config = EngineConfig(pids, tp_size)
    return EngineClient(config, module="fake_worker", env=env, start_timeout=timeout)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def processes(pids: Path, count: int) -> list[int]:
    """Ids of the workers and of the agent, once ``count`` workers have noted theirs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        notes = [note.read_text().split() for note in pids.iterdir()]
        if len([note for note in notes if len(note) == 2]) == count:
            agents = {int(note[1]) for note in notes} if count > 1 else set()
            return [int(note[0]) for note in notes] + sorted(agents)
        time.sleep(0.05)
    raise AssertionError(f"only {len(list(pids.iterdir()))} of {count} workers came up")


def assert_gone(found: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while left := [pid for pid in found if alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.05)


def engine_folders(pids: Path) -> list[Path]:
    return list(pids.parent.glob("tpctl-*"))


def surroundings(pids: Path) -> dict[str, Any]:
    """What rank 0 found itself in: its environment, and what it could read from stdin."""
    found: dict[str, Any] = json.loads((pids.parent / "surroundings.json").read_text())
    return found


def request(name: str, max_tokens: int = 3) -> Request:
    return Request(name, [1, 2], SamplingParams(max_tokens=max_tokens))


def finish(client: EngineClient) -> list[Output]:
    collected: list[Output] = []
    while not collected or collected[-1].finish_reason is None:
        collected += client.outputs()
    return collected
