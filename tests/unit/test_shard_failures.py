"""Sharding that fails half-way: full disks, refusals, and sources that change while they are read."""

from __future__ import annotations

import errno
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.errors import (
    CheckpointError,
    OutputError,
)
from tpctl.sharding.cutting import writer
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving import files as sharding_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(), files=2)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "Input/output error")],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_failing_disk_leaves_nothing_new_and_the_old_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        shard_checkpoint(source, out, 4)
    before = folder_bytes(out) if force else None
    calls = []

    def failing(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        return os.write(fd, data)

    monkeypatch.setattr(sharding_files.os, "pwrite", failing)
    with pytest.raises(OutputError, match=message) as caught:
        shard_checkpoint(source, out, 2, force=force)
    assert "\n" not in str(caught.value)
    assert "nothing was published" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["model", "out"] if force else ["model"])
    if before is not None:
        assert folder_bytes(out) == before


def test_a_disk_that_fails_while_more_is_written(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells such an error once, to whoever waits for the disk first."""

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sharding_files, "FLUSH_BYTES", 1)
    monkeypatch.setattr(sharding_files.os, "fdatasync", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        shard_checkpoint(source, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("force", [False, True])
def test_after_an_error_the_finished_parts_are_taken_over(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, force: bool
) -> None:
    out = tmp_path / "out"
    shard_checkpoint(source, tmp_path / "calm", 2, max_part_size=3000)
    if force:
        shard_checkpoint(source, out, 4)
    before = folder_bytes(out) if force else None
    real, done = writer._Writer._write_part, []

    def failing(self: Any, index: int, files: Any) -> Any:
        if len(done) == 3:
            raise OSError(code, os.strerror(code))
        done.append(index)
        return real(self, index, files)

    with monkeypatch.context() as patch:
        patch.setattr(writer._Writer, "_write_part", failing)
        with pytest.raises(OutputError) as caught:
            shard_checkpoint(source, out, 2, max_part_size=3000, force=force)
    assert "nothing was published" in str(caught.value)
    assert str(caught.value).endswith("; the finished parts are kept, the same command goes on after them")
    assert (folder_bytes(out) if out.exists() else None) == before
    kept = {f"model-rank-{rank}-part-{index}.safetensors" for rank in (0, 1) for index in range(3)}
    assert set(names(tmp_path / ".out.tpctl-partial")) == kept | {f"part-{index}.json" for index in range(3)}
    sizes = sum((tmp_path / ".out.tpctl-partial" / name).stat().st_size for name in kept)
    report = shard_checkpoint(source, out, 2, max_part_size=3000, force=force)
    assert report.resumed_bytes == sizes
    assert folder_bytes(out) == folder_bytes(tmp_path / "calm")
    assert names(tmp_path) == ["calm", "model", "out"]


def test_too_little_space_is_told_before_writing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 1000, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(OutputError, match=r"needs \d+ bytes, but only 1000 are free") as caught:
        shard_checkpoint(source, tmp_path / "out", 2)
    assert real.f_bavail > 1000
    assert "choose another place" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_no_permission_is_one_line(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"no permission to write .*choose another folder"):
        shard_checkpoint(source, tmp_path / "out", 2)


def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(done: int, total: int, what: str = "") -> None:
        os.utime(source / "model-00001-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        shard_checkpoint(source, tmp_path / "out", 2, progress=touch)
    assert not (tmp_path / "out").exists()


def rewrite(path: Path) -> None:
    """Change the last byte, and set the time of change back."""
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def put_another(path: Path) -> None:
    """Put another file of the same size and times in its place."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, put_another])
@pytest.mark.parametrize(
    "name", ["model-00002-of-00002.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_a_source_that_changes_unseen_by_its_mtime_is_noticed(
    tmp_path: Path, source: Path, name: str, change: Callable[[Path], None]
) -> None:
    changed = []

    def once(done: int, total: int, what: str = "") -> None:
        if not changed:
            changed.append(change(source / name))

    time.sleep(0.02)  # file systems count time in steps of some milliseconds
    with pytest.raises(CheckpointError, match=rf"{name} changed while it was read \(.*; run again") as caught:
        shard_checkpoint(source, tmp_path / "out", 2, max_part_size=3000, progress=once)
    assert "kept" not in str(caught.value)
    assert names(tmp_path) == ["model"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_large_files_beside_the_weights_are_not_held_in_memory(tmp_path: Path, source: Path) -> None:
    with (source / "notes.pdf").open("wb") as file:
        file.truncate(64_000_000)
    tracemalloc.start()
    shard_checkpoint(source, tmp_path / "out", 2)
    merge_shards(tmp_path / "out", tmp_path / "merged")
    reshard(tmp_path / "out", tmp_path / "three", 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32_000_000
    assert (tmp_path / "merged" / "notes.pdf").stat().st_size == 64_000_000


def test_a_source_that_shrinks_meanwhile_is_noticed(tmp_path: Path, source: Path) -> None:
    def cut(done: int, total: int, what: str = "") -> None:
        for path in source.glob("*.safetensors"):
            os.truncate(path, 100)

    with pytest.raises(CheckpointError, match=r"too early: it was cut while|changed while it was read"):
        shard_checkpoint(source, tmp_path / "out", 2, progress=cut)
    assert not (tmp_path / "out").exists()


def test_a_read_error_names_the_file(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sharding_files.os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"model-0000\d-of-00002\.safetensors cannot be read at byte \d+: Input"):
        shard_checkpoint(source, tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
