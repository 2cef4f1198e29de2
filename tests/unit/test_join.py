"""Ranks added to a shard folder: by later runs, by several at once, and only to what they belong to."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.arch.config import Cutting
from tpctl.checkpoint.folder import CheckpointFile
from tpctl.checkpoint.locks import exclusive
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.errors import CheckpointError, OutputError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting import join, writer
from tpctl.sharding.cutting.join import piece_name
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.publishing.pending import PendingFolder

TABLE = TensorSpec("model.layers.1.self_attn.rotary_emb.inv_freq", "F32", (3,))
RUN = """
import sys, time
from pathlib import Path
from tpctl.sharding.cutting.shard import shard_checkpoint
ranks = [int(rank) for rank in sys.argv[3].split(",")]
slowly = lambda done, total, what="": time.sleep(0.0005)
shard_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), 4, max_part_size=3000, ranks=ranks, progress=slowly)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(), files=2, extra=[TABLE])


@pytest.fixture
def whole(tmp_path: Path, source: Path) -> dict[str, bytes]:
    """The folder of one run that writes every rank."""
    shard_checkpoint(source, tmp_path / "whole", 4, max_part_size=3000)
    return folder_bytes(tmp_path / "whole")


def add(source: Path, out: Path, ranks: list[int], **options: Any) -> Any:
    return shard_checkpoint(source, out, 4, **{"max_part_size": 3000, "ranks": ranks, **options})


def start(source: Path, out: Path, ranks: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", RUN, str(source), str(out), ranks], env=environment)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "runs", [[[0, 1], [2, 3]], [[3], [0], [2], [1]], [[1, 2], [0, 1, 2, 3]], [[0, 1], [1, 2], [3]]]
)
def test_runs_for_some_ranks_make_the_folder_of_one_run(
    tmp_path: Path, source: Path, whole: dict[str, bytes], runs: list[list[int]]
) -> None:
    out, held = tmp_path / "out", set[int]()
    for ranks in runs:
        report = add(source, out, ranks)
        held |= set(ranks)
        assert set(report.bytes_per_rank) == held
        assert set(report.missing_ranks) == {0, 1, 2, 3} - held
    assert folder_bytes(out) == whole
    merge_shards(out, tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
    assert names(tmp_path) == ["merged", "model", "out", "whole"]


def test_ranks_that_are_there_are_not_written_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    add(source, out, [0, 1])
    inodes = {name: (out / name).stat().st_ino for name in names(out) if name.startswith("model-")}
    add(source, out, [1, 2])
    assert inodes == {name: (out / name).stat().st_ino for name in inodes}


def test_several_machines_at_once(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    children = [start(source, out, ranks) for ranks in ("0", "1,2", "3")]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert folder_bytes(out) == whole
    assert names(tmp_path) == ["model", "out", "whole"]


def test_they_do_not_wait_for_each_other_while_they_write(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = tmp_path / "out", writer._Writer.write_parts, []

    def meanwhile(self: Any) -> Any:
        calls.append(self.recipe.ranks)
        if len(calls) == 1:
            add(source, out, [1, 2, 3])  # a whole run in the middle of the first one's
        return real(self)

    monkeypatch.setattr(writer._Writer, "write_parts", meanwhile)
    add(source, out, [0, 1])
    assert calls == [(0, 1), (1, 2, 3)]
    assert folder_bytes(out) == whole


def test_a_run_whose_ranks_others_have_added_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = tmp_path / "out", writer._Writer.write_parts, []

    def meanwhile(self: Any) -> Any:
        calls.append(self.recipe.ranks)
        if len(calls) == 1:
            add(source, out, [0, 1])
        return real(self)

    monkeypatch.setattr(writer._Writer, "write_parts", meanwhile)
    with pytest.raises(OutputError, match="holds ranks 0-1 of tp 4 already") as caught:
        add(source, out, [1])
    assert "kept" not in str(caught.value)
    assert names(tmp_path) == ["model", "out"]


def test_ranks_that_are_published_at_the_same_time_are_all_kept(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run must not read the manifest while the first is between reading and publishing its union."""
    out, real, errors = tmp_path / "out", writer.union, list[BaseException]()
    add(source, out, [0])
    joining = threading.Event()

    def second() -> None:
        joining.wait()
        try:
            add(source, out, [2])
        except BaseException as error:
            errors.append(error)

    def slowly(*arguments: Any) -> Any:
        if not joining.is_set():
            joining.set()
            time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(writer, "union", slowly)
    thread = threading.Thread(target=second)
    thread.start()
    add(source, out, [1])
    thread.join()
    assert errors == []
    assert set(Manifest.load(out).shards) == {0, 1, 2}


def test_the_same_ranks_twice_are_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    add(source, out, [0, 1])
    before = folder_bytes(out)
    with pytest.raises(OutputError, match="holds ranks 0-1 of tp 4 already, and no other is asked for; use --force"):
        add(source, out, [1])
    with pytest.raises(OutputError, match="exists already; use --force"):
        shard_checkpoint(source, out, 4, max_part_size=3000)
    assert folder_bytes(out) == before
    add(source, out, [3], force=True)
    assert [name for name in names(out) if "part-0" in name] == ["model-rank-3-part-0.safetensors"]


def other_weights(source: Path) -> None:
    path = source / "model-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    info = read_header(path).tensors["model.embed_tokens.weight"]
    raw[info.start] ^= 1  # in a row that only rank 0 holds
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            None,
            {"max_part_size": 4000},
            "cut with --max-part-size 3000B, but --max-part-size 4000B is asked for; ask for --max-part-size 3000B",
        ),
        (
            None,
            {"dtype": "float32"},
            "cut with --dtype auto, but --dtype float32 is asked for; ask for --dtype auto, use --force",
        ),
        (None, {"compat": "vllm"}, "cut with no --compat, but --compat vllm is asked for; ask for no --compat, use"),
        (None, {"cutting": Cutting(even=True)}, "cut with --no-even, but --even is asked for; ask for --no-even, use"),
        (None, {"revision": "b"}, "cut with revision a, but b is asked for"),
        ("config", {}, "a source with another config.json"),
        ("tokenizer", {}, "a source with another tokenizer.json"),
        ("more", {}, "a source with another notes.md"),
        ("header", {}, "a source with another model.safetensors.index.json"),
        ("weights", {}, r"holds ranks that this source does not give \(model.embed_tokens.weight of rank 0 differs"),
    ],
)
def test_what_is_no_piece_of_the_same_cut_is_refused(
    tmp_path: Path, source: Path, change: str | None, options: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    add(source, out, [0, 1], revision="a")
    before = folder_bytes(out)
    if change == "config":
        (source / "config.json").write_text(json.dumps(make_config(rms_norm_eps=0.5)))
    elif change == "tokenizer":
        (source / "tokenizer.json").write_text('{"version": "1.1"}')
    elif change == "more":
        (source / "notes.md").write_text("new")
    elif change == "header":
        shutil.rmtree(source)
        make_checkpoint(source, make_config(), files=2, dtype="F32", extra=[TABLE])
    elif change == "weights":
        other_weights(source)
    with pytest.raises(OutputError, match=message) as caught:
        add(source, out, [2, 3], **{"revision": "a", **options})
    assert "use --force to replace the folder, or choose another one (-o)" in str(caught.value)
    assert folder_bytes(out) == before


def test_another_tp_size_is_refused_before_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(source, tmp_path / "out", [0, 1])
    monkeypatch.setattr(writer._Writer, "write_parts", lambda self: pytest.fail("wrote"))
    with pytest.raises(OutputError, match="holds ranks cut with tp size 4, but 3 is asked for"):
        shard_checkpoint(source, tmp_path / "out", 3, ranks=[2], max_part_size=3000)
    assert names(tmp_path) == ["model", "out"]


def test_sources_that_the_hub_vouches_for_are_not_compared(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"model-00001-of-00002.safetensors": "a" * 64, "model-00002-of-00002.safetensors": "b" * 64}
    monkeypatch.setattr(CheckpointFile, "sha256", property(lambda file: known[file.name]))
    add(source, tmp_path / "out", [0, 1])
    monkeypatch.setattr(join, "move_all", lambda *_, **__: pytest.fail("compared"))
    add(source, tmp_path / "out", [2])
    known["model-00002-of-00002.safetensors"] = "c" * 64
    with pytest.raises(OutputError, match="another model-00002-of-00002"):
        add(source, tmp_path / "out", [3])


def test_damaged_ranks_are_not_joined(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    add(source, out, [0, 1])
    path = out / "model-rank-1-part-1.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(OutputError, match="of rank 1 differs from its source"):
        add(source, out, [2])


def test_where_files_cannot_be_linked_they_are_copied(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(join.os, "link", refuse)
    add(source, tmp_path / "out", [0, 1])
    add(source, tmp_path / "out", [2, 3])
    assert folder_bytes(tmp_path / "out") == whole


def test_reshard_adds_ranks_too(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    shard_checkpoint(source, tmp_path / "two", 2, max_part_size=3000)
    for ranks in ([1], [0, 3], [2]):
        reshard(tmp_path / "two", tmp_path / "out", 4, ranks=ranks)
    assert folder_bytes(tmp_path / "out") == whole
    with pytest.raises(OutputError, match="two itself, which is read"):
        reshard(tmp_path / "two", tmp_path / "two", 4, ranks=[3])


def test_a_source_that_changes_while_ranks_are_compared_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(source, tmp_path / "out", [0, 1])
    before = folder_bytes(tmp_path / "out")
    monkeypatch.setattr(join, "move_all", lambda *_, **__: other_weights(source))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        add(source, tmp_path / "out", [2, 3])
    assert folder_bytes(tmp_path / "out") == before


def test_sigkill_while_ranks_are_added(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    """The folder with two ranks or the one with four, and what is left over harms neither."""
    out, rng = tmp_path / "out", random.Random(7)
    pending = tmp_path / ".out.ranks-2-3.tpctl-partial"
    add(source, out, [0, 1])
    before = folder_bytes(out)
    for _ in range(5):
        shutil.rmtree(out)
        add(source, out, [0, 1])
        child = start(source, out, "2,3")
        name = rng.choice(
            ["model-rank-2-part-4.safetensors", "tpctl-extra.safetensors", "model-rank-0-part-0.safetensors"]
        )
        while child.poll() is None and not (pending / name).exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        child.wait()
        assert folder_bytes(out) in (before, whole)
        if folder_bytes(out) == before:
            add(source, out, [2, 3])
        else:  # killed while it removed what it had replaced, or later
            with pytest.raises(OutputError, match="holds ranks 0-3 of tp 4 already"):
                add(source, out, [2, 3])
        assert folder_bytes(out) == whole
    assert {name for name in names(tmp_path) if "partial" in name or "lock" in name} == set()


def test_a_kill_right_before_publishing_leaves_both_folders_usable(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pending folder then holds second names of published files, which the next run must not write to."""
    out = tmp_path / "out"
    add(source, out, [0, 1])
    before = folder_bytes(out)
    with monkeypatch.context() as patch:
        patch.setattr(PendingFolder, "publish", lambda self: sys.exit(137))
        with pytest.raises(SystemExit):
            add(source, out, [2, 3])
    assert folder_bytes(out) == before
    add(source, out, [2, 3])
    assert folder_bytes(out) == whole


def test_an_error_right_at_publishing_loses_no_finished_part(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PendingFolder) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = tmp_path / "out"
    add(source, out, [0, 1])
    with monkeypatch.context() as patch:
        patch.setattr(PendingFolder, "publish", fail)
        with pytest.raises(OutputError, match="nothing was published; the finished parts are kept"):
            add(source, out, [2, 3])
    report = add(source, out, [2, 3])
    assert report.resumed_bytes == report.bytes_per_rank[2] + report.bytes_per_rank[3] + report_extra(out)
    assert folder_bytes(out) == whole


def report_extra(out: Path) -> int:
    return (out / "tpctl-extra.safetensors").stat().st_size


def test_what_killed_runs_left_of_pieces_goes_once_the_folder_is_complete(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PendingFolder, "publish", lambda self: sys.exit(137))
        for target, ranks in ((out, [0, 1]), (out, [2]), (tmp_path / "other", [2])):
            with pytest.raises(SystemExit):
                add(source, target, ranks)
    add(source, out, [0])
    assert (tmp_path / ".out.ranks-0-1.tpctl-partial").exists()
    with exclusive(tmp_path / ".out.ranks-0-1.tpctl-lock"):  # a run that is under way
        add(source, out, [1, 2, 3])
    left = [".other.ranks-2.tpctl-partial", ".out.ranks-0-1.tpctl-partial"]
    assert names(tmp_path) == [*left, "model", "out"]
    shard_checkpoint(source, out, 4, force=True)
    assert names(tmp_path) == [".other.ranks-2.tpctl-partial", "model", "out"]


def test_names_of_pieces() -> None:
    assert piece_name([0, 1, 4]) == "ranks-0-1,4"
    assert piece_name([3]) == "ranks-3"
    assert len(piece_name(range(0, 500, 2))) < 30
    assert piece_name(range(0, 500, 2)) != piece_name(range(1, 500, 2))
