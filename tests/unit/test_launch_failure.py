"""Of several ranks' ends, the one that brought the others about is told, in one line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tpctl.errors import EngineError, ShardFolderError
from tpctl.launch.environment import available_cores
from tpctl.launch.failure import RankFailure, explain, parse_error, read_error_file, read_report, root_cause
from tpctl.launch.torchrun import _last_line

KILLED = RankFailure(2, -signal.SIGKILL, None, 105.0)
RAISED = RankFailure(1, 1, "ValueError: bad weights", 104.0)
SILENT = RankFailure(3, 7, None, 104.0)
LOST = RankFailure(0, 1, "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer", 103.0)
ENDED = RankFailure(4, -signal.SIGTERM, None, 100.0)
ABORTED = RankFailure(5, -signal.SIGABRT, None, 101.0)


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([LOST, KILLED, ENDED], KILLED),
        ([LOST, RAISED, ENDED, ABORTED], RAISED),
        ([ENDED, LOST], LOST),
        ([LOST, SILENT, ABORTED], SILENT),
        ([ABORTED, ENDED], ABORTED),
        ([RAISED, RankFailure(0, 1, "KeyError: 'x'", 103.0)], RankFailure(0, 1, "KeyError: 'x'", 103.0)),
        ([], None),
    ],
)
def test_root_cause(failures: list[RankFailure], cause: RankFailure | None) -> None:
    assert root_cause(failures) == cause
    assert root_cause(failures[::-1]) == cause


@pytest.mark.parametrize(
    ("failure", "tail", "said"),
    [
        (KILLED, None, "rank 2 was killed (SIGKILL), as the system does when memory runs out; free memory, or"),
        (RAISED, None, "rank 1 failed: ValueError: bad weights; its output is in /logs"),
        (SILENT, None, "rank 3 ended with exit code 7 and said nothing; its output is in /logs"),
        (SILENT, "ImportError: x", "rank 3 ended with exit code 7: ImportError: x; its output is in /logs"),
        (RankFailure(0, -signal.SIGSEGV), None, "rank 0 was ended by SIGSEGV; its output is in /logs"),
        (RankFailure(0, -99), None, "rank 0 was ended by signal 99; its output is in /logs"),
        (RankFailure(0, 1, "E: first\nsecond"), None, "rank 0 failed: E: first; its output is in /logs"),
    ],
)
def test_explain(failure: RankFailure, tail: str | None, said: str) -> None:
    error = explain(failure, tail, Path("/logs"))
    assert isinstance(error, EngineError)
    assert str(error).startswith(said)
    assert "\n" not in str(error)


def test_our_own_kinds_come_back_as_they_were() -> None:
    error = explain(RankFailure(1, 1, "ShardFolderError: part 3 is missing: a: b"), None, Path("/logs"))
    assert type(error) is ShardFolderError
    assert str(error) == "part 3 is missing: a: b"
    assert type(parse_error("Exception: x")) is EngineError


def test_files(tmp_path: Path) -> None:
    report, error = tmp_path / "report.json", tmp_path / "error.json"
    assert read_report(report) == []
    assert read_error_file(error) is None
    entry = {"rank": 1, "exit_code": 1, "message": "ValueError: bad weights", "timestamp": 104.0}
    report.write_text(json.dumps([entry]))
    assert read_report(report) == [RAISED]
    for message in ({"message": "E: x", "extraInfo": {}}, "E: x"):
        error.write_text(json.dumps({"message": message}))
        assert read_error_file(error) == "E: x"
    for broken in ("{", '{"message": {}}', "[]"):
        error.write_text(broken)
        assert read_error_file(error) is None


def test_cores_respect_a_containers_quota(tmp_path: Path) -> None:
    available = available_cores(tmp_path / "none")
    assert available >= 1
    for text, expected in [("max 100000", available), ("50000 100000", 1), ("100000 100000", 1)]:
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert available_cores(tmp_path / "cpu.max") == expected
    (tmp_path / "cpu.max").write_text("99900000 100000")
    assert available_cores(tmp_path / "cpu.max") == available


def test_the_last_line_is_the_last_exception(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _last_line(log) is None
    log.write_text("Traceback\n  x\ntorch.OutOfMemoryError: no room\nand then a warning\n\n")
    assert _last_line(log) == "torch.OutOfMemoryError: no room"
    log.write_text("one\ntwo \n\n")
    assert _last_line(log) == "two"
