"""Workers keep bytecode in tpctl's cache exactly where the installation has none and will get none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.machinery import ModuleSpec
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from tpctl.launch import bytecode
from tpctl.launch.bytecode import bytecode_environment
from tpctl.launch.torchrun import Workers
from tpctl.wire.settings import EngineConfig


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for torch/__init__.py, without bytecode."""
    source = tmp_path / "installed" / "torch" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("answer = 42\n")
    monkeypatch.setattr(bytecode, "find_spec", lambda name: ModuleSpec(name, None, origin=str(source)))
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    return source


def test_a_python_that_may_not_write_writes_into_the_cache(torch: Path, tmp_path: Path) -> None:
    base = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(torch.parent.parent)}
    env = {**base, **bytecode_environment(base)}
    for _ in range(2):
        assert subprocess.check_output([sys.executable, "-c", "import torch; print(torch.answer)"], env=env) == b"42\n"
    assert not (torch.parent / "__pycache__").exists()
    (compiled,) = (tmp_path / "cache" / "bytecode").rglob("torch/*.pyc")
    assert compiled.name == Path(cache_from_source(str(torch))).name


def test_a_folder_that_is_not_ours_to_write(torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytecode_environment({}) == {}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != torch.parent)
    assert bytecode_environment({})["PYTHONPYCACHEPREFIX"].startswith(str(tmp_path / "cache"))


def test_a_place_that_others_may_write_to_or_that_cannot_be_made_is_not_used(
    torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}
    place = Path(bytecode_environment(quiet)["PYTHONPYCACHEPREFIX"])
    assert place.stat().st_mode & 0o777 == 0o700
    place.parent.chmod(0o777)
    assert bytecode_environment(quiet) == {}
    monkeypatch.setenv("TPCTL_CACHE", "/dev/null/cache")
    assert bytecode_environment(quiet) == {}


def test_another_installation_has_another_place(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}
    before = bytecode_environment(quiet)
    assert bytecode_environment(quiet) == before
    monkeypatch.setattr(bytecode, "distributions", list)
    assert bytecode_environment(quiet) != before


def test_workers_are_started_with_it(torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def run(self: Workers, command: list[str], variables: dict[str, str], started: threading.Event) -> None:
        seen.update(variables)
        self._exited.set()
        started.set()

    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.setattr(Workers, "_run", run)
    Workers(EngineConfig(tmp_path, 1)).close()
    assert seen["PYTHONPYCACHEPREFIX"].startswith(str(tmp_path / "cache"))
    assert not seen["PYTHONDONTWRITEBYTECODE"]


def test_what_is_compiled_already_or_placed_by_the_user_stays(torch: Path) -> None:
    assert bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/elsewhere"}) == {}
    compiled = Path(cache_from_source(str(torch)))
    compiled.parent.mkdir()
    compiled.touch()
    assert bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1"}) == {}


def test_without_torch_or_a_home_nothing_is_changed(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCTL_CACHE", "~nobody-of-this-name/cache")
    assert bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1"}) == {}
    monkeypatch.setattr(bytecode, "find_spec", lambda name: None)
    assert bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1"}) == {}
