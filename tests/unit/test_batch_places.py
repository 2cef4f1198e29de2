"""Where ``batch`` reads and writes: files that are one, that appear, vanish or fill up, and pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from tpctl.cli import places
from tpctl.cli.places import refuse_own_input
from tpctl.cli.streams import NamedFile
from tpctl.client.jobs import Line
from tpctl.client.results import Results, partial_of
from tpctl.errors import OutputError, SourceError, UsageError

ROW = {"id": 1, "text": "answer"}


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x"}\n')
    (tmp_path / "link").symlink_to("p.jsonl")
    os.link(path, tmp_path / "hard")
    shutil.copy(path, tmp_path / "out.jsonl.partial")
    os.mkfifo(tmp_path / "pipe")
    return path


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("p.jsonl", "p.jsonl", "p.jsonl is input and output at once; name"),
        ("p.jsonl", "./p.jsonl", "p.jsonl is input and output at once, as ./p.jsonl"),
        ("p.jsonl", "link", "p.jsonl is input and output at once, as link"),
        ("link", "hard", "link is input and output at once, as hard"),
        (
            "out.jsonl.partial",
            "out.jsonl",
            "at once, as out.jsonl.partial, where rows are kept; name",
        ),
        ("pipe", "pipe", "pipe is input and output at once; name"),
    ],
)
def test_one_file_is_not_read_and_written(prompts: Path, source: str, output: str, said: str) -> None:
    before = prompts.read_bytes()
    with pytest.raises(UsageError, match=re.escape(said)):
        refuse_own_input(source, output)
    assert prompts.read_bytes() == before
    refuse_own_input(source, "new.jsonl")


@contextlib.contextmanager
def stream_is(number: int, path: Path, flags: int) -> Iterator[None]:
    """``path`` as the standard stream ``number``."""
    kept, opened = os.dup(number), os.open(path, flags)
    os.dup2(opened, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(opened)


def test_nor_is_it_by_redirection(prompts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        stream_is(1, prompts, os.O_WRONLY | os.O_APPEND),
        pytest.raises(UsageError, match="at once, as standard output; name"),
    ):
        refuse_own_input("p.jsonl", "-")
    with (
        stream_is(0, prompts, os.O_RDONLY),
        pytest.raises(UsageError, match=r"standard input is .* at once, as p\.jsonl; name"),
    ):
        refuse_own_input("-", "p.jsonl")


@pytest.mark.parametrize("before", [None, "old\n"])
def test_an_output_that_appears_or_changes_meanwhile_is_left(tmp_path: Path, before: str | None) -> None:
    out = tmp_path / "out.jsonl"
    if before:
        out.write_text(before)
    with Results(out, {}, force=before is not None) as results:
        results.add(Line(0, 1, b"a"), ROW)
        out.write_text("somebody else's\n")
        said = "out.jsonl (appeared|changed) while this ran, and is left as it is; move it away, or replace"
        with pytest.raises(OutputError, match=said) as caught:
            results.publish(1)
    assert ("appeared" in str(caught.value)) == (before is None)
    assert out.read_text() == "somebody else's\n"
    if before is None:
        with pytest.raises(OutputError, match=r"appeared after the run began .*move it away, or .* --resume --force"):
            Results(out, {}, resume=True)
    with Results(out, {}, resume=True, force=True) as results:
        assert results.count == 1
        results.publish(1)
    assert json.loads(out.read_text()) == ROW
    assert not partial_of(out).exists()


def test_a_run_that_was_to_replace_goes_on_without_being_told_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    with Results(out, {}, force=True) as results:
        results.add(Line(0, 1, b"a"), ROW)
    with Results(out, {}, resume=True) as results:
        results.publish(1)
    assert json.loads(out.read_text()) == ROW


def test_rows_survive_the_folder_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "results"
    folder.mkdir()
    out = folder / "out.jsonl"
    with Results(out, {}) as results:
        results.add(Line(0, 1, b"a"), ROW)
        shutil.rmtree(folder)
        said = r"folder of .*out\.jsonl is gone; make it again and go on with --resume, after `mv (\S+) (\S+)`, which"
        with pytest.raises(OutputError, match=said) as caught:
            results.publish(1)
    moved = re.search(said, str(caught.value))
    assert moved is not None
    folder.mkdir()
    shutil.move(moved[1], moved[2])
    with Results(out, {}, resume=True) as results:
        assert results.has(Line(0, 1, b"a"))
        results.publish(1)
    assert json.loads(out.read_text()) == ROW


def test_a_partial_file_that_vanishes_costs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out, {}) as results:
        results.add(Line(0, 1, b"a"), ROW)
        partial_of(out).unlink()
        results.publish(1)
    assert json.loads(out.read_text()) == ROW


def test_a_pipe_says_what_it_waits_for(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    with places.output_stream("pipe", None) as stream:
        assert stream is not None
        stream.write(b"row\n")
    reader.join()
    assert got == [b"row\n"]
    assert capsys.readouterr().err == "waiting for somebody to read pipe\n"
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(b"{}\n"))
    writer.start()
    with places.opened("pipe", count=True) as (source, total):
        assert (source.read(), total) == (b"{}\n", None)
    writer.join()
    assert capsys.readouterr().err == "waiting for somebody to write to pipe\n"


def test_an_output_whose_end_cannot_be_written_fails(tmp_path: Path) -> None:
    """As on a network disk, which says at the end only that it is full."""
    real = io.FileIO.close

    def full(self: io.FileIO) -> None:
        real(self)
        raise OSError(28, "No space left on device", "device")

    with (
        mock.patch.object(NamedFile, "close", full, create=True),
        pytest.raises(OutputError, match="No space left"),
        places.output_stream(str(tmp_path / "device"), None) as stream,
    ):
        assert stream is not None
        stream.write(b"row\n")


def test_a_link_to_a_pipe_is_a_stream(prompts: Path) -> None:
    """As /dev/stdout is, whose link leads to a name that is none."""
    Path("out-pipe").symlink_to("pipe")
    reads, writes = os.pipe()
    for name in ("pipe", "out-pipe", f"/dev/fd/{writes}", "/dev/null"):
        assert places.target_of(name) is None
    assert places.target_of("link") == prompts.resolve()
    os.close(reads)
    os.close(writes)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_in_the_way_of_the_kept_rows_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "z.jsonl.partial")
    with pytest.raises(OutputError, match=r"z\.jsonl\.partial, where rows are kept until all are there, is no file"):
        Results(tmp_path / "z.jsonl", {})


def test_a_model_in_the_place_of_the_prompts_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" * 100)
    with (
        pytest.raises(SourceError, match=r"model\.gguf is a GGUF model, not a file of prompts; give it with --model"),
        places.opened(str(tmp_path / "model.gguf"), count=True),
    ):
        pass
    (tmp_path / "lines").write_bytes(b"{}\n{}\n")
    with places.opened(str(tmp_path / "lines"), count=True) as (stream, total):
        assert (total, stream.read()) == (2, b"{}\n{}\n")
