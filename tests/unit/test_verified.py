"""Damaged shards are found before they are run, and sound ones are hashed once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.checkpoint.safetensors import read_header
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.client.prepare import EngineArgs, configure, prepare
from tpctl.errors import ShardFolderError
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving.transfer import hash_all
from tpctl.sharding.proving import verified

OPTIONS = EngineArgs(device="cpu", tp=2)
PART = "model-rank-1-part-0.safetensors"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many tensors each call hashed."""
    calls: list[int] = []

    def counting(tensors, files, tally):  # type: ignore[no-untyped-def]
        calls.append(len(tensors))
        hash_all(tensors, files, tally)

    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "hash_all", counting)
    return calls


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(), files=2)


@pytest.fixture
def given(tmp_path: Path, model: Path) -> ResolvedSource:
    """A shard folder that somebody brings."""
    shard_checkpoint(model, tmp_path / "mine", 2, max_part_size=6000)
    return ResolvedSource(tmp_path / "mine", "mine", None)


def flip(path: Path) -> str:
    """Change a bit in the middle of the data, but not the file's size, and name the tensor."""
    raw, header = path.read_bytes(), read_header(path)
    place = (header.size + len(raw)) // 2
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    return next(name for name, info in header.tensors.items() if info.start <= place < info.stop)


def test_a_flipped_bit_is_found_by_tensor_and_rank(
    hashed: list[int], given: ResolvedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpctl.client.prepare.supported_source", lambda model, tp_size, **options: given)
    name = flip(given.folder / PART)
    for _ in range(2):  # a failure is not remembered as good
        with pytest.raises(ShardFolderError, match="is damaged") as caught:
            prepare("mine", OPTIONS)
        assert f"{name} of rank 1" in str(caught.value)


def test_a_bit_flipped_after_the_first_start_is_found(hashed: list[int], given: ResolvedSource) -> None:
    configure(given, OPTIONS)
    flip(given.folder / PART)
    with pytest.raises(ShardFolderError, match="of rank 1 is damaged"):
        configure(given, OPTIONS)


def test_a_given_folder_is_hashed_once_and_again_when_touched(hashed: list[int], given: ResolvedSource) -> None:
    configure(given, OPTIONS)
    configure(given, OPTIONS)
    assert len(hashed) == 1
    os.utime(given.folder / PART, ns=(3, 3))
    configure(given, OPTIONS)
    configure(given, OPTIONS)
    assert len(hashed) == 2
    [note] = (given.folder.parent / "cache" / "verified").iterdir()
    for nonsense in ("{", "[]", '{"manifest": 3}', note.read_text().replace('"ranks": [0, 1]', '"ranks": [0]')):
        note.write_text(nonsense)
        configure(given, OPTIONS)
    assert len(hashed) == 6


def test_another_manifest_or_folder_is_hashed_on_its_own(hashed: list[int], model: Path, given: ResolvedSource) -> None:
    configure(given, OPTIONS)
    shard_checkpoint(model, given.folder, 2, source_id="other", max_part_size=6000, force=True)
    configure(given, OPTIONS)
    copy = given.folder.with_name("copy")
    given.folder.rename(copy)
    configure(ResolvedSource(copy, "copy", None), OPTIONS)
    assert len(hashed) == 3


def test_what_tpctl_wrote_itself_counts_as_good_until_it_changes(hashed: list[int], model: Path) -> None:
    source = ResolvedSource(model, "org/model", "abc")
    folder = configure(source, OPTIONS).shard_dir
    configure(source, OPTIONS)
    assert not hashed
    name = flip(folder / PART)
    with pytest.raises(ShardFolderError) as caught:
        configure(source, OPTIONS)
    assert f"{name} of rank 1 is damaged" in str(caught.value)
    assert str(caught.value).endswith(f"; remove {folder}, it is made again when it is needed")
    assert len(hashed) == 1


def test_edited_copied_files_are_refused_or_made_again(hashed: list[int], model: Path, given: ResolvedSource) -> None:
    for name in ("config.json", "tokenizer.json"):
        text = (given.folder / name).read_bytes()
        (given.folder / name).write_bytes(text + b" ")
        with pytest.raises(ShardFolderError, match=rf"{name} was altered after it was copied"):
            configure(given, OPTIONS)
        (given.folder / name).write_bytes(text)
    source = ResolvedSource(model, "org/model", "abc")
    config = configure(source, OPTIONS).shard_dir / "config.json"
    config.write_text(config.read_text() + " ")
    configure(source, OPTIONS)
    assert config.read_bytes() == (model / "config.json").read_bytes()


def test_a_cache_that_cannot_be_written_only_costs_the_hashing(
    hashed: list[int], given: ResolvedSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "file"))
    configure(given, OPTIONS)
    configure(given, OPTIONS)
    assert len(hashed) == 2
