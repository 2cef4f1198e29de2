"""The agent's notes of how its ranks end, also where torchrun takes the child's status before the watch can."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tpctl.launch.failure import RankFailure, read_report
from tpctl.launch.rank_watch import RankWatch


def rank(watch: RankWatch, number: int, code: int, error_file: Path) -> None:
    os.environ |= {"RANK": str(number), "TORCHELASTIC_ERROR_FILE": str(error_file)}
    watch.announce()
    error_file.with_suffix(".up").touch()
    while not error_file.exists():
        time.sleep(0.01)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


@pytest.mark.parametrize("reaped", [False, True])
def test_ends_are_noted_in_their_order(tmp_path: Path, reaped: bool) -> None:
    watch = RankWatch(tmp_path / "report.json")
    fork = multiprocessing.get_context("fork")
    codes = {2: 3, 0: -9, 1: 0}
    files = {number: tmp_path / f"error-{number}.json" for number in codes}
    children = {
        number: fork.Process(target=rank, args=(watch, number, codes[number], files[number])) for number in codes
    }
    for child in children.values():
        child.start()
    while not all(file.with_suffix(".up").exists() for file in files.values()):
        time.sleep(0.01)
    for count, number in enumerate(codes, 1):
        files[number].write_text('{"message": "ValueError: x"}')
        if reaped:
            children[number].join()
        while number != 1 and len(read_report(tmp_path / "report.json")) < count:
            time.sleep(0.01)
    for child in children.values():
        child.join()
    watch.add([RankFailure(2, 1, "what torchrun says later"), RankFailure(5, 1, None)])
    found = [(failure.rank, failure.exit_code, failure.message) for failure in read_report(tmp_path / "report.json")]
    assert found == [(2, 3, "ValueError: x"), (0, -9, "ValueError: x"), (5, 1, None)]
