"""Batch: where rows are written to, and what stands in the way."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.batch_runs import rows, run
from tests.unit.fake_client import write_tokenizer
from tpctl.cli import places
from tpctl.cli.app import app
from tpctl.cli.console import note
from tpctl.cli.streams import NamedFile
from tpctl.client.jobs import Line
from tpctl.client.results import Results
from tpctl.client.resume import check_target, remains
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import OutputError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_nothing_is_left_of_a_run_without_rows(tmp_path: Path) -> None:
    with Results(tmp_path / "out.jsonl", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    with (
        Results(tmp_path / "out.jsonl", {}),
        pytest.raises(OutputError, match="another tpctl batch is writing"),
    ):
        Results(tmp_path / "out.jsonl", {})


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder does not exist"):
        Results(tmp_path / "none" / "out.jsonl", {})
    with pytest.raises(OutputError, match="is a folder; name a file"):
        Results(tmp_path, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Results(tmp_path / "out.jsonl", {}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "kept"})
        with (
            Path("/dev/full").open("r+b", buffering=0) as full,
            monkeypatch.context() as patch,
            pytest.raises(OutputError, match=r"out\.jsonl\.partial: the disk is full; free some space$"),
        ):
            patch.setattr(results, "_file", full)
            results.add(Line(1, 2, b"b"), {"id": 2, "text": "x"})
        with (
            pytest.raises(
                OutputError, match=r"^full; 1 finished row is in .*out\.jsonl\.partial, go on with --resume$"
            ),
            remains(results, note),
        ):
            raise OutputError("full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_stream_that_takes_no_rows_is_one_line() -> None:
    with Results(None, {}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "lost"})
        said = r"^cannot write to /dev/full: No space left on device; name a file on a disk with -o, beside which"
        with pytest.raises(OutputError, match=said), places.writing():
            results.emit(NamedFile("/dev/full", "wb", "/dev/full"))
        with pytest.raises(BrokenPipeError), places.writing():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe", "standard output")


def tpctl(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_finished_answers_are_replaced_only_when_told(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    out.write_text('{"id": 1, "text": "dear"}\n')
    for more in ([], ["--resume"]):
        with pytest.raises(OutputError, match=r"out\.jsonl exists already; use --force to replace it"):
            check_target(out, resume=bool(more), force=False)
        result = tpctl("batch", str(prompts), "-o", str(out), *more)
        assert isinstance(result.exception, OutputError)
    assert "dear" in out.read_text()
    check_target(out, resume=False, force=True)
    out.with_name("out.jsonl.partial").write_text("rows of a run that was started with --force")
    check_target(out, resume=True, force=False)
    out.write_text("")  # as mktemp makes it
    check_target(out, resume=False, force=False)


def test_pipes_and_devices_are_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert places.target_of(str(pipe)) is None
    assert places.target_of("/dev/null") is None
    assert places.target_of("-") is None
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with places.output_stream(str(pipe), None) as out, Results(None, {}) as results:
        assert out is not None
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "x"})
        results.emit(out)
        assert json.loads(os.read(reader, 1000)) == {"id": 1, "text": "x"}
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(UsageError, match="--resume needs a file"):
        raise tpctl("batch", "nothing.jsonl", "-o", str(pipe), "--resume").exception


def test_a_link_and_the_files_mode_stay(tokenizer: Tokenizer, tmp_path: Path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.write_text("")
    real.chmod(0o600)
    link.symlink_to(real)
    target = places.target_of(str(link))
    run(tokenizer, '{"prompt": "a"}', target)
    assert link.is_symlink()
    assert rows(real)[0]["text"] == "<a>"
    assert real.stat().st_mode & 0o777 == 0o600
    with Results(target, {"model": "m"}) as results:
        assert results.partial is not None
        assert results.partial.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_could_not_be_written_is_not_said_again(tmp_path: Path) -> None:
    """A file that is closed tries once more what it still holds."""
    with (
        pytest.raises(OutputError, match=r"out\.jsonl\.partial: the disk is full; free some space$"),
        Results(tmp_path / "out.jsonl", {}) as results,
    ):
        results._file.close()
        results._file = io.BufferedRandom(io.FileIO("/dev/full", "r+"))
        results._file.seek = lambda *place: 0  # type: ignore[method-assign]
        results.add(Line(1, 2, b"b"), {"id": 2, "text": "x"})


@pytest.mark.parametrize(("output", "said"), [("", "-o is empty"), ("/", "lies in /, where the rows go")])
def test_outputs_without_a_name(output: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    error = CliRunner().invoke(app, ["batch", str(tmp_path / "in.jsonl"), "-o", output]).exception
    assert isinstance(error, UsageError | OutputError)
    assert said in str(error)
