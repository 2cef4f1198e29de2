"""Shards as a cache: made once, found again, made again when they must be."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bad_input import local_answer
from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.errors import OutputError, ShardFolderError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding import cache
from tpctl.sharding.cache import ensure_sharded
from tpctl.sharding.cutting.shard import shard_checkpoint


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedSource:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    folder = make_checkpoint(tmp_path / "model", make_config(), files=2)
    return ResolvedSource(folder, "org/model", "abc")


def stamp(folder: Path) -> int:
    return (folder / "tpctl.json").stat().st_ino


def test_it_is_made_once_and_found_again(source: ResolvedSource, tmp_path: Path) -> None:
    seen: list[int] = []
    folder = ensure_sharded(source, 2, progress=lambda done, total, what="": seen.append(done))
    assert seen
    assert folder.parent == tmp_path / "cache" / "shards"
    assert folder.name.startswith("model-tp2-")
    before = stamp(folder)
    assert ensure_sharded(source, 2, progress=lambda *_: pytest.fail("made again")) == folder
    assert stamp(folder) == before
    manifest = Manifest.load(folder)
    assert (manifest.source.id, manifest.source.revision) == ("org/model", "abc")


def test_what_differs_has_another_folder(source: ResolvedSource) -> None:
    first = ensure_sharded(source, 2)
    others = [
        ensure_sharded(source, 3),
        ensure_sharded(source, 2, dtype="float32"),
        ensure_sharded(source, 2, text_only=True),  # which without is refused, of a model that sees
        ensure_sharded(ResolvedSource(source.folder, "org/model", "def"), 2),
        ensure_sharded(ResolvedSource(source.folder, "org/other", "abc"), 2),
    ]
    os.utime(source.folder / "model-00001-of-00002.safetensors", ns=(3, 3))
    others.append(ensure_sharded(source, 2))
    (source.folder / "config.json").write_text(json.dumps(make_config(rms_norm_eps=1e-3)))
    others.append(ensure_sharded(source, 2))
    assert len({first, *others}) == 8


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest"])
def test_a_damaged_folder_is_made_again(source: ResolvedSource, damage: str) -> None:
    folder = ensure_sharded(source, 2)
    part = folder / "model-rank-1-part-0.safetensors"
    whole = part.read_bytes()
    if damage == "missing":
        part.unlink()
    elif damage == "truncated":
        os.truncate(part, 10)
    else:
        (folder / "tpctl.json").write_text("{")
    assert ensure_sharded(source, 2) == folder
    assert part.read_bytes() == whole


def test_a_shard_folder_is_used_as_it_is(source: ResolvedSource, tmp_path: Path) -> None:
    shard_checkpoint(source.folder, tmp_path / "mine", 3)
    given = ResolvedSource(tmp_path / "mine", "mine", None)
    assert ensure_sharded(given, 3) == tmp_path / "mine"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ShardFolderError, match=r"cut for tp 3, but tp 2 is asked for; use --tp 3, or .*tpctl reshard"):
        ensure_sharded(given, 2)
    (tmp_path / "mine" / "model-rank-2-part-0.safetensors").unlink()
    with pytest.raises(ShardFolderError, match="is missing"):
        ensure_sharded(given, 3)


WANTED: list[tuple[str, dict[str, Any], tuple[int, int | None], str]] = [
    ("dense", {}, (2, 2), r"mine is cut for --ep 1, and not to be had for --ep 2: the model has no experts that"),
    ("dense", {}, (64, None), r"mine is cut for tp 2, and not to be had for tp 64: .*use --tp 1 to 4$"),
    (
        "experts",
        {},
        (2, 2),
        r"--ep 1, but --ep 2 is asked for; make a new one: `tpctl reshard \S*mine --tp 2 --ep 2 -o",
    ),
    (
        "experts",
        {"cutting": Cutting(2)},
        (2, 1),
        r"but --ep 1 is asked for; .* `tpctl reshard \S*mine --tp 2 --ep 1 -o",
    ),
    ("experts", {"cutting": Cutting(2)}, (3, None), r"not to be had for tp 3: 3 ranks do not form 2 equal groups"),
    ("experts", {"compat": "vllm"}, (2, 2), r"`tpctl reshard \S*mine --tp 2 --ep 2 --compat none -o FOLDER`$"),
    ("experts", {"compat": "vllm"}, (4, None), r"use --tp 2, or .*`tpctl reshard \S*mine --tp 4 -o FOLDER`$"),
    ("experts", {"compat": "vllm"}, (3, 3), r"use --tp 2, or .*mine --tp 3 --ep 3 --compat none -o FOLDER`$"),
    (
        "dense",
        {"ranks": [0]},
        (3, None),
        r"not to be had for tp 3: \S*mine holds rank 0 of tp 2, but all are needed; add",
    ),
]


@pytest.mark.parametrize(("kind", "how", "asked", "said"), WANTED)
def test_a_shard_folder_that_is_cut_otherwise_suggests_only_what_works(
    tmp_path: Path, kind: str, how: dict[str, Any], asked: tuple[int, int | None], said: str
) -> None:
    mixture = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "vocab_size": 64}
    config = make_config() if kind == "dense" else make_config("qwen3_moe", **mixture)
    folder, (tp_size, groups) = tmp_path / "mine", asked
    shard_checkpoint(make_checkpoint(tmp_path / "model", config), folder, 2, **how)
    with pytest.raises(ShardFolderError, match=said) as caught:
        ensure_sharded(ResolvedSource(folder, "mine", None), tp_size, expert_parallel=groups)
    if (command := re.search("`tpctl (reshard .*) -o FOLDER`", str(caught.value))) is not None:
        assert local_answer(f"{command[1]} -o out", tmp_path).code == 0


def test_a_folder_of_some_ranks_names_the_missing_ones(source: ResolvedSource, tmp_path: Path) -> None:
    shard_checkpoint(source.folder, tmp_path / "mine", 4, ranks=[0, 1])
    with pytest.raises(ShardFolderError, match="mine holds ranks 0-1 of tp 4, but all are needed; add ranks 2-3: "):
        ensure_sharded(ResolvedSource(tmp_path / "mine", "mine", None), 4)


def test_two_threads_at_once_make_it_once(source: ResolvedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counting(*args: object, **kwargs: object) -> object:
        made.append(1)
        return shard_checkpoint(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "shard_checkpoint", counting)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_sharded(source, 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(made) == 1


def test_a_full_cache_disk_is_told(source: ResolvedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 1, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(OutputError, match=r"only 1 are free on its disk.*TPCTL_CACHE"):
        ensure_sharded(source, 2)
