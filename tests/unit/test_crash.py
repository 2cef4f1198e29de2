"""The sharder under SIGKILL, Ctrl-C, a full file system and company: the old folder or the new one, never a
mixture."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.errors import OutputError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting import writer
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.publishing.pending import PendingFolder

PARTS = 200_000
RUN = """
import sys
import time
from pathlib import Path
from tpctl.sharding.cutting.shard import shard_checkpoint
slowly = lambda done, total, what="": time.sleep(0.0005)
source, out = Path(sys.argv[1]), Path(sys.argv[2])
report = shard_checkpoint(source, out, 3, max_part_size=200_000, force=True, progress=slowly)
print(report.resumed_bytes)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4 MB in 12 parts a rank."""
    config = make_config(hidden_size=192, intermediate_size=520, vocab_size=900, num_hidden_layers=4, head_dim=48)
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", config, files=2)


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", RUN, str(source), str(out)], env=environment, stdout=subprocess.PIPE)


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.tpctl-partial"


def test_sigkill_at_twenty_random_moments_then_resume(source: Path, tmp_path: Path) -> None:
    shard_checkpoint(source, tmp_path / "calm", 3, max_part_size=PARTS)
    wanted = folder_bytes(tmp_path / "calm")
    shard_checkpoint(source, tmp_path / "two", 2)
    old = folder_bytes(tmp_path / "two")
    out, rng = tmp_path / "out", random.Random(20)
    last = len(Manifest.load(tmp_path / "calm").shards[0].parts) - 1
    resumed = 0
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "two", out)
        child, part = start(source, out), rng.randint(0, last)
        # Some time after a part began, so that a busy machine kills as early and as late as an idle one; the first
        # and the last part stand for what comes before and after them.
        while child.poll() is None and not (partial(out) / f"model-rank-0-part-{part}.safetensors").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.wait()
        assert folder_bytes(out) in (old, wanted)
        report = shard_checkpoint(source, out, 3, max_part_size=PARTS, force=True)
        resumed += report.resumed_bytes > 0
        assert folder_bytes(out) == wanted
    assert resumed >= 3
    shutil.rmtree(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]


def test_a_killed_run_is_resumed_after_its_last_complete_part(source: Path, tmp_path: Path) -> None:
    shard_checkpoint(source, tmp_path / "calm", 3, max_part_size=PARTS)
    out = tmp_path / "out"
    child = start(source, out)
    while not (partial(out) / "part-4.json").is_file():
        assert child.poll() is None
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert not out.exists()
    done = {path.name: path.stat().st_ino for path in partial(out).glob("model-rank-?-part-[0-4].safetensors")}
    assert len(done) == 15
    report = shard_checkpoint(source, out, 3, max_part_size=PARTS)
    assert report.resumed_bytes >= sum((out / name).stat().st_size for name in done)
    assert {name: (out / name).stat().st_ino for name in done} == done
    assert folder_bytes(out) == folder_bytes(tmp_path / "calm")


def interrupt(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, parts: int, **options: Any) -> None:
    """A run that Ctrl-C ends after some parts."""
    real = writer._Writer._write_part
    written = []

    def limited(self: Any, index: int, files: Any) -> Any:
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(index)
        return real(self, index, files)

    with monkeypatch.context() as patch:
        patch.setattr(writer._Writer, "_write_part", limited)
        with pytest.raises(KeyboardInterrupt) as ended:
            shard_checkpoint(source, out, 3, max_part_size=PARTS, **options)
    said = "the finished parts are kept, the same command goes on after them"
    assert ended.value.args == ((said,) if parts else ())
    assert partial(out).exists() == (parts > 0)


def test_a_damaged_part_of_a_killed_run_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_checkpoint(source, tmp_path / "calm", 3, max_part_size=PARTS)
    out = tmp_path / "out"
    interrupt(source, out, monkeypatch, parts=4)
    for index, flip in ((0, 2000), (1, 20), (2, -1)):
        path = partial(out) / f"model-rank-{index}-part-{index}.safetensors"
        data = bytearray(path.read_bytes())
        data[flip] ^= 1
        path.write_bytes(data)
    report = shard_checkpoint(source, out, 3, max_part_size=PARTS)
    kept = sum(path.stat().st_size for path in out.glob("model-rank-?-part-3.safetensors"))
    assert report.resumed_bytes == kept
    assert folder_bytes(out) == folder_bytes(tmp_path / "calm")


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"dtype": "float32"}, {"max_part_size": 300_000}, {"ranks": [0]}])
def test_parts_of_another_job_are_not_taken_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = {"tp_size": 3, "max_part_size": PARTS, **options}
    shard_checkpoint(source, tmp_path / "calm", **options)
    interrupt(source, tmp_path / "out", monkeypatch, parts=4)
    report = shard_checkpoint(source, tmp_path / "out", **options)
    assert report.resumed_bytes == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "calm")


def test_parts_of_a_source_that_changed_since_are_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "model", make_config(hidden_size=192))
    out = tmp_path / "out"
    monkeypatch.setattr(sys.modules[__name__], "PARTS", 20_000)
    interrupt(source, out, monkeypatch, parts=2)
    os.utime(source / "model.safetensors", ns=(5, 5))
    assert shard_checkpoint(source, out, 3, max_part_size=20_000).resumed_bytes == 0


@pytest.mark.parametrize("other", [{"revision": "b"}, {"source_id": "org/other"}])
def test_parts_of_another_revision_are_dropped_and_that_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    """Even where every file has the same name, size and header."""
    job = {"revision": "a", "source_id": "org/model"}
    interrupt(source, tmp_path / "out", monkeypatch, parts=2, **job)
    left = sum(path.stat().st_size for path in partial(tmp_path / "out").glob("*.safetensors"))
    report = shard_checkpoint(source, tmp_path / "out", 3, max_part_size=PARTS, **{**job, **other})
    assert (report.resumed_bytes, report.dropped_bytes) == (0, left)
    assert left > 0
    assert not partial(tmp_path / "out").exists()
    interrupt(source, tmp_path / "again", monkeypatch, parts=2, **job)
    report = shard_checkpoint(source, tmp_path / "again", 3, max_part_size=PARTS, **job)
    assert report.resumed_bytes > 0 and report.dropped_bytes == 0


def test_a_limit_on_file_size_is_a_full_disk(source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes real writes fail half-way, in a real process."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.argv = ["tpctl", "shard", {str(source)!r}, "--tp", "2", "-o", {str(tmp_path / "out")!r}]
from tpctl.cli.app import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("tpctl: no space left while writing")
    assert "nothing was published" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 150_000


def test_ctrl_c_ends_the_command_and_keeps_what_is_complete(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = start(source, out)
    while not (partial(out) / "part-1.json").is_file():
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    assert child.wait() != 0
    assert not out.exists()
    assert shard_checkpoint(source, out, 3, max_part_size=PARTS).resumed_bytes > 0


def test_two_runs_at_once_do_not_corrupt(source: Path, tmp_path: Path) -> None:
    shard_checkpoint(source, tmp_path / "calm", 3, max_part_size=PARTS)
    children = [start(source, tmp_path / "out") for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "calm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]


def test_the_second_of_two_runs_finds_the_folder_made(source: Path, tmp_path: Path) -> None:
    out, entered, errors = tmp_path / "out", threading.Event(), []

    def second() -> None:
        entered.set()
        try:
            shard_checkpoint(source, out, 2)
        except OutputError as error:
            errors.append(str(error))

    with PendingFolder.open(out, force=False) as pending:
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        (pending.path / "file").write_text("first")
        time.sleep(0.2)
        pending.publish()
    thread.join()
    assert "exists already" in errors[0]
    assert folder_bytes(out) == {"file": b"first"}
