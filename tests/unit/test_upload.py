"""``tpctl upload``, and ``download --local-ranks`` of what it put there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.downloads import Run, failed, files
from tests.unit.downloads import commands as commands  # the fixtures
from tests.unit.downloads import run as run
from tests.unit.hub_server import Hub, Refusal, serving
from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.shard import shard_checkpoint


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(token="hf_secret")) as served:
        yield served


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = make_checkpoint(tmp_path / "source", make_config())
    shard_checkpoint(source, tmp_path / "shards", 3)
    (tmp_path / "shards" / ".hidden").write_text("stays here")
    return tmp_path / "shards"


def test_uploaded_shards_come_back_byte_for_byte(hub: Hub, run: Run, shards: Path, tmp_path: Path) -> None:
    result = run("upload", str(shards), "org/shards", "--json", HF_TOKEN="hf_secret", HF_HUB_DISABLE_XET="1")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    held = files(str(shards))
    del held[".hidden"]
    assert hub.repos["org/shards"]["main"] == held
    assert (report["files"], report["bytes"]) == (len(held), sum(map(len, held.values())))
    assert report["commit"] in report["url"]
    result = run("download", "org/shards", "--token", "hf_secret")
    assert files(result.stdout.strip()) == held
    Manifest.load(Path(result.stdout.strip())).check_files(Path(result.stdout.strip()))


def test_local_ranks_fetches_those_ranks_and_later_the_others(hub: Hub, run: Run, shards: Path) -> None:
    held = {name: data for name, data in files(str(shards)).items() if not name.startswith(".")}
    commit = hub.add("org/shards", held)
    hub.token = None
    some = {name for name in held if "rank-1" not in name}
    for model in ("org/shards", f"org/shards@{commit}"):
        result = run("download", model, "--local-ranks", "0,2")
        assert set(files(result.stdout.strip())) == some, result.stderr
    folder = result.stdout.strip()
    inspected = run("inspect-shards", folder, "--verify")
    assert inspected.returncode == 0, inspected.stderr
    assert "not here: the files of rank 1;" in inspected.stdout
    assert inspected.stdout.endswith("not verified: rank 1 (files are not here)\n")
    assert "the files of rank 1 are not in" in failed(run("inspect-shards", folder, "--verify", "--rank", "1"))
    assert set(files(run("download", f"org/shards@{commit}").stdout.strip())) == set(held)
    assert "not verified" not in run("inspect-shards", folder, "--verify").stdout
    assert len(hub.bodies("model-rank-0-part-0.safetensors")) == 1
    assert "no shard of rank 3" in failed(run("download", "org/shards", "--local-ranks", "3"))
    hub.add("org/whole", {"config.json": b"{}", "model.safetensors": b""})
    assert "org/whole is not sharded" in failed(run("download", "org/whole", "--local-ranks", "0"))
    assert run("download", "org/shards", "--local-ranks", "x").returncode == 2


def test_refused_uploads_say_why(hub: Hub, run: Run, shards: Path) -> None:
    nobody = failed(run("upload", str(shards), "org/shards"))
    assert "HTTP 401" in nobody and "hf auth login" in nobody
    hub.refusals = [Refusal("/api/repos/create", 403)]
    reader = failed(run("upload", str(shards), "org/shards", "--token", "hf_secret"))
    assert "HTTP 403" in reader and "lacks the right" in reader
    hub.refusals = [Refusal("/upload/", 400)]
    broken = failed(run("upload", str(shards), "org/shards", "--token", "hf_secret", HF_HUB_DISABLE_XET="1"))
    assert "refuses org/shards (HTTP 400)" in broken


def test_what_is_no_model_is_not_uploaded(hub: Hub, run: Run, shards: Path, tmp_path: Path) -> None:
    part = shards / "model-rank-1-part-0.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    for folder, repo, said in (
        (shards, "org/shards", "by the manifest"),
        (tmp_path / "empty", "org/shards", "has no config.json"),
        (tmp_path / "missing", "org/shards", "there is no folder"),
        (shards, "shards", "write org/name"),
    ):
        assert said in failed(run("upload", str(folder), repo))
    assert hub.requests == []
