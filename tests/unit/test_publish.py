"""Publishing: replacing a folder while others try, and on systems that exchange no names or keep no locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.errors import OutputError, TpctlError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting import writer
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.publishing import exchange
from tpctl.sharding.publishing import pending as publish


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(), files=2)


@pytest.fixture
def old(tmp_path: Path, source: Path) -> Path:
    """A published folder, cut for 2 ranks."""
    shard_checkpoint(source, tmp_path / "out", 2)
    return tmp_path / "out"


@pytest.fixture(params=["no such call", "another file system"])
def no_exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without renameat2, or a file system (NFS) that refuses it."""

    class Library:
        pass

    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    library: Any = Library()
    if request.param != "no such call":
        library.renameat2 = refuse
    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda *_, **__: library)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_lock_covers_the_end_of_a_forced_run(
    tmp_path: Path, source: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first run removes what it replaced, which has the pending folder's name, a second one begins."""
    real, errors = shutil.rmtree, list[BaseException]()
    writing = threading.Event()

    def second() -> None:
        try:
            shard_checkpoint(source, old, 4, force=True, progress=lambda *_: writing.set())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=second)

    def slowly(path: Path, *arguments: Any, **options: Any) -> None:
        if threading.current_thread() is not thread:
            thread.start()
            assert not writing.wait(0.5), "the second run writes where the first one removes"
        real(path, *arguments, **options)

    monkeypatch.setattr(publish.shutil, "rmtree", slowly)
    shard_checkpoint(source, old, 3, force=True)
    thread.join()
    assert errors == []
    assert Manifest.load(old).tp_size == 4
    assert names(tmp_path) == ["model", "out"]


@pytest.mark.usefixtures("no_exchange")
def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path: Path, source: Path, old: Path) -> None:
    shard_checkpoint(source, tmp_path / "calm", 3)
    shard_checkpoint(source, old, 3, force=True)
    assert folder_bytes(old) == folder_bytes(tmp_path / "calm")
    assert names(tmp_path) == ["calm", "model", "out"]


@pytest.mark.usefixtures("no_exchange")
def test_a_kill_between_the_two_renames_is_mended(
    tmp_path: Path, source: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_bytes(old)
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".tpctl-partial"):
            raise SystemExit  # a kill: what would put the old folder back does not happen either
        if self.name.endswith(".tpctl-old"):
            return target
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(SystemExit):
            shard_checkpoint(source, old, 3, force=True)
    assert not old.exists()
    with pytest.raises(OutputError, match="exists already"):
        shard_checkpoint(source, old, 3)
    assert folder_bytes(old) == before
    shard_checkpoint(source, old, 3, force=True)
    assert names(tmp_path) == ["model", "out"]


@pytest.mark.usefixtures("no_exchange")
def test_a_rename_that_fails_gives_the_old_folder_back(
    tmp_path: Path, source: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = folder_bytes(old), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tpctl-partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error; nothing was published"):
        shard_checkpoint(source, old, 3, force=True)
    assert folder_bytes(old) == before


def test_an_old_folder_that_cannot_be_removed_is_told_as_that(
    source: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(publish.shutil, "rmtree", refuse)
    with pytest.raises(OutputError, match="is complete, but the folder that it replaced cannot be removed") as caught:
        shard_checkpoint(source, old, 3, force=True)
    assert "published" not in str(caught.value) and "kept" not in str(caught.value)
    assert Manifest.load(old).tp_size == 3


def test_a_file_system_without_locks_still_takes_one_run(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    errors = []
    real = writer._Writer.write_parts

    def meanwhile(self: Any) -> Any:
        with pytest.raises(OutputError) as caught:
            shard_checkpoint(source, tmp_path / "out", 2)
        errors.append(str(caught.value))
        return real(self)

    monkeypatch.setattr(writer._Writer, "write_parts", meanwhile)
    shard_checkpoint(source, tmp_path / "out", 2)
    [error] = errors
    assert ".out.tpctl-lock says that process" in error and "remove the file if it has" in error
    assert names(tmp_path) == ["model", "out"]


def test_a_folder_that_cannot_be_synced_is_published_all_the_same(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refuse(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(exchange.os, "fsync", refuse)
    shard_checkpoint(source, tmp_path / "out", 2)
    assert Manifest.load(tmp_path / "out").tp_size == 2


def test_a_folder_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another program, which knows nothing of our lock."""
    out, real = tmp_path / "out", writer._Writer.write_parts

    def meanwhile(self: Any) -> Any:
        out.mkdir()
        (out / "letter.txt").write_text("dear")
        return real(self)

    monkeypatch.setattr(writer._Writer, "write_parts", meanwhile)
    with pytest.raises(OutputError, match="appeared while this ran"):
        shard_checkpoint(source, out, 2)
    assert names(out) == ["letter.txt"]


RUNS: dict[str, Callable[[Path, Path, Callable[..., None]], object]] = {
    "shard": lambda place, out, told: shard_checkpoint(
        place / "model", out, 2, max_part_size=6000, progress=lambda *done: told(*done)
    ),
    "merge": lambda place, out, told: merge_shards(place / "shards", out, progress=lambda *done: told(*done)),
    "reshard": lambda place, out, told: reshard(place / "shards", out, 3, progress=lambda *done: told(*done)),
}


def half_way(command: str, place: Path, out: Path, change: Callable[[], object]) -> str:
    """The message of ``command``, while which ``change`` happens."""
    changed = False

    def told(done: int, total: int, what: str = "") -> None:
        nonlocal changed
        if done > total // 2 and not changed:
            changed = True
            change()

    with pytest.raises(TpctlError) as caught:
        RUNS[command](place, out, told)
    assert changed
    return str(caught.value)


@pytest.mark.parametrize("command", RUNS)
def test_a_target_that_appears_meanwhile_is_left(tmp_path: Path, source: Path, command: str) -> None:
    shard_checkpoint(source, tmp_path / "shards", 2)
    out = tmp_path / "out"
    for appear in (lambda: out.write_text("x"), lambda: (out.mkdir(), (out / "letter").write_text("x"))):
        said = half_way(command, tmp_path, out, appear)
        assert "out appeared while this ran, and is left as it is; move it away, or choose another folder" in said
        assert "x" in (out.read_text() if out.is_file() else (out / "letter").read_text())
        out.unlink() if out.is_file() else shutil.rmtree(out)
    shard_checkpoint(source, tmp_path / "calm", 2, max_part_size=6000)
    if command == "shard":  # what was finished is used
        assert "the finished parts are kept" in said
        assert shard_checkpoint(source, out, 2, max_part_size=6000).resumed_bytes
        assert folder_bytes(out) == folder_bytes(tmp_path / "calm")


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("gone", ["below", "below/.out.tpctl-partial"])
def test_a_target_that_vanishes_meanwhile_is_said(tmp_path: Path, source: Path, command: str, gone: str) -> None:
    shard_checkpoint(source, tmp_path / "shards", 2)
    (tmp_path / "below").mkdir()
    said = half_way(command, tmp_path, tmp_path / "below" / "out", lambda: shutil.rmtree(tmp_path / gone))
    assert f"{tmp_path / gone} vanished while this ran, with all that was written" in said
    assert "kept" not in said


def test_a_source_that_is_cut_meanwhile_is_said(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "shards", 2)
    for command, name in {"shard": "model/model-00002-of-00002", "merge": "shards/model-rank-1-part-0"}.items():
        path = tmp_path / f"{name}.safetensors"
        said = half_way(command, tmp_path, tmp_path / "out", partial(os.truncate, path, 1000))
        assert f"{path.name} ends at byte" in said or f"{path.name} changed while it was read" in said
        assert "run" in said.rpartition(";")[2] and not (tmp_path / "out").exists()
