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
from tpctl.batch.formats.parquet_sink import ParquetSink
from tpctl.cli import places
from tpctl.cli.app import app
from tpctl.cli.batch_report import end_if_finished
from tpctl.cli.streams import NamedFile
from tpctl.client.jobs import Line
from tpctl.client.results import Results, partial_of
from tpctl.client.resume import check_target, remains, rows_left
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
            remains(lambda: rows_left(results)),
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
    with pytest.raises(OutputError, match=r"out\.jsonl exists already; use --force to replace it"):
        check_target(out, force=False)
    for more in ([], ["--resume"]):
        result = tpctl("batch", str(prompts), "-o", str(out), *more)
        assert isinstance(result.exception, OutputError)
    assert "dear" in out.read_text()
    check_target(out, force=True)
    out.write_text("")  # as mktemp makes it
    check_target(out, force=False)


def test_a_partial_file_is_gone_on_with_though_there_is_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("of an earlier run\n")
    partial_of(out).write_text("rows of a run that was started with --force")
    end_if_finished(None, out, partial_of(out))


ROWS = [
    {"id": 1, "text": "A", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1},
    {"id": "b", "text": "B", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1},
]


@pytest.mark.parametrize("text", ["", "\n \n"])
@pytest.mark.parametrize("output", ["rows.jsonl", "-"])
def test_a_file_without_prompts_needs_no_model(
    text: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(text)
    result = tpctl("batch", "in.jsonl", "-o", output, "--model", "no/where")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "in.jsonl holds no prompts, so no model is loaded\n"
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"] + ["rows.jsonl"] * (output != "-")
    assert output == "-" or Path(output).read_bytes() == b""


FAILED = {"id": "b", "error": "line 3: the prompt is empty"}


@pytest.mark.parametrize("replicas", [[], ["--replicas", "2"]])
def test_a_batch_that_is_finished_is_so_again(tmp_path: Path, replicas: list[str]) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n\n{"id": "b", "prompt": "b"}\n')

    def again(*found: object) -> Any:
        out.write_text("".join(json.dumps(row) + "\n" for row in found))
        before = out.read_bytes()
        result = tpctl("batch", str(prompts), "-o", str(out), "--resume", *replicas)
        assert out.read_bytes() == before and sorted(tmp_path.iterdir()) == [prompts, out]
        return result

    result = again(*ROWS)
    assert result.exit_code == 0 and f"{out} is finished: 2 rows, 0 errors; nothing is left to do" in result.stderr
    result = again(ROWS[0], FAILED)
    assert result.exit_code == 1 and "2 rows, 1 error; nothing" in result.stderr and result.exception.code == 1
    for others in (ROWS[:1], [*ROWS, ROWS[1]], ROWS[::-1], [ROWS[0], {"id": "b", "prompt": "b"}], [ROWS[0], 7]):
        result = again(*others)
        assert isinstance(result.exception, OutputError)
        assert f"is no finished output of the lines of {prompts}; name another file" in str(result.exception)
        assert "--force would delete what is in it" in str(result.exception)


def test_a_finished_output_in_openai_s_form(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "q", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    prompts.write_text(json.dumps(line) + "\n")
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    row = {"id": "x", "custom_id": "q", "response": {"status_code": 200, "body": {"usage": usage}}, "error": None}
    out.write_text(json.dumps(row) + "\n")
    assert tpctl("batch", str(prompts), "-o", str(out), "--resume").exit_code == 0
    out.write_text(json.dumps({**row, "custom_id": "r"}) + "\n")
    assert isinstance(tpctl("batch", str(prompts), "-o", str(out), "--resume").exception, OutputError)


def test_a_finished_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    prompts.write_text('{"prompt": "a"}\n{"id": "b", "prompt": "b"}\n')
    with out.open("wb") as file:
        ParquetSink(None, "text").encode(file, 0, [json.dumps(row).encode() for row in ROWS])
    assert tpctl("batch", str(prompts), "-o", str(out), "--resume").exit_code == 0
    out.write_text("no Parquet")
    assert isinstance(tpctl("batch", str(prompts), "-o", str(out), "--resume").exception, OutputError)


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
