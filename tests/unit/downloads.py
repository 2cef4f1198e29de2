"""What the tests of ``tpctl download`` fetch, and how they call it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import Forks, forks
from tests.unit.hub_server import Hub, serving

WEIGHTS = bytes(range(256)) * 12_000
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickled",
    "README.md": b"hello",
    "onnx/model.onnx": b"onnx",
}
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """This process' environment, with ``hub`` as the Hub and caches in ``folder``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TPCTL_"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "TPCTL_CACHE": str(folder / "cache")}
    return {**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"}


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def needed(model: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in model.items() if re.search(r"^[^/]*\.(json|safetensors)$", name)}


def failed(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tpctl: "), result.stderr
    return lines[0]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as served:
        yield served


@pytest.fixture(scope="module")
def commands() -> Iterator[Forks]:
    with forks() as started:
        yield started


@pytest.fixture
def run(hub: Hub, tmp_path: Path, commands: Forks) -> Run:
    return lambda *arguments, **env: commands.run(arguments, {**environment(hub, tmp_path), **env})
