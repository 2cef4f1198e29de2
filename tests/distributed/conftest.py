"""What several modules of this folder need once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.fake_engine import assert_gone
from tests.distributed.real_forms import shallow
from tpctl.checkpoint.cache import cache_root
from tpctl.checkpoint.sources import ResolvedSource


@pytest.fixture(scope="session")
def small(demo: ResolvedSource, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two of the demo model's layers: quick, for where it does not matter what is answered. Shards of it are not left
    in the cache."""
    name = f"two-layers-{os.getpid()}"
    folder = shallow(demo.folder, tmp_path_factory.mktemp("small") / name, 2)
    for file in demo.folder.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    yield str(folder)
    for made in (cache_root() / "shards").glob(f"*{name}-*"):
        if made.is_dir():
            shutil.rmtree(made)
        else:
            made.unlink()


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the workers' notes; the engine's own folder lands beside it, so it can be looked at."""
    folder = tmp_path / "pids"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    assert_gone([int(note.read_text().split()[0]) for note in folder.iterdir() if note.read_text()])
