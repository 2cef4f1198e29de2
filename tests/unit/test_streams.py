"""Standard streams that are closed, full, or read by nobody: one line at most, and an exit code that tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.cli.streams import NamedFile
from tpctl.sharding.cutting.shard import shard_checkpoint

COMMANDS = [
    "--help",
    "bench --help",
    "--version",
    "inspect-shards SHARDS",
    "inspect-shards SHARDS --json",
    "plan MODEL",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    make_checkpoint(folder / "MODEL", make_config())
    shard_checkpoint(folder / "MODEL", folder / "SHARDS", 2)
    return folder


def tpctl(folder: Path, command: str, redirection: str = "", **streams: int) -> subprocess.CompletedProcess[str]:
    line = f"exec {sys.executable} -m tpctl {command} {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TPCTL_CACHE": str(folder / "cache")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=environment, text=True, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.daily(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_cannot_be_written(folder: Path, command: str) -> None:
    result = tpctl(folder, command, ">&-")
    assert (result.returncode, result.stderr) == (1, "tpctl: standard output: closed\n")
    if Path("/dev/full").exists():
        result = tpctl(folder, command, ">/dev/full")
        assert (result.returncode, result.stderr) == (1, "tpctl: standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = tpctl(folder, command, stdout=writer)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
    result = tpctl(folder, command, "2>&-")  # nothing to say there
    assert result.returncode == 0
    assert result.stdout


def test_what_was_done_before_stays_done(folder: Path) -> None:
    result = tpctl(folder, "shard MODEL --tp 3 -o DONE", ">&-")
    assert (result.returncode, result.stderr) == (1, "tpctl: standard output: closed\n")
    assert (folder / "DONE" / "tpctl.json").is_file()
    assert tpctl(folder, "inspect-shards DONE --verify").returncode == 0


def test_an_error_goes_before_what_its_output_meets(folder: Path) -> None:
    result = tpctl(folder, "plan NONE/AT/ALL", ">&-")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "NONE/AT/ALL" in result.stderr
    assert tpctl(folder, "shard", ">&- 2>&-").returncode == 2
    assert tpctl(folder, "plan NONE/AT/ALL", ">&- 2>&- <&-").returncode == 1


def test_closed_input_is_not_empty_input(folder: Path) -> None:
    result = tpctl(folder, "chat SHARDS", "<&-")
    assert (result.returncode, result.stderr) == (1, "tpctl: standard input: closed\n")


def test_a_named_file_says_its_name() -> None:
    nowhere = NamedFile(os.devnull, "wb", "the file")  # a file that can only be written ...
    with pytest.raises(OSError, match=r"closed: 'the file'"):
        os.dup2(os.open(os.devnull, os.O_RDONLY), nowhere.fileno())  # ... and then only be read
        nowhere.write(b"x")
    nowhere.close()
    nothing = NamedFile(os.devnull, "rb", "the file")
    os.dup2(os.open(os.devnull, os.O_WRONLY), nothing.fileno())
    for read in (lambda: nothing.readinto(bytearray(8)), nothing.readall):
        with pytest.raises(OSError, match=r"closed: 'the file'"):
            read()
    nothing.close()


def test_no_file_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    done = tpctl(tmp_path, "plan nowhere")
    assert done.stderr.startswith("tpctl: 'nowhere' is no model") and done.stderr.count("\n") == 1
