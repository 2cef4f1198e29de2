"""The agent's notes of how its ranks end, also where torchrun takes the child's status before the watch can."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from tpctl.launch.failure import RankFailure, read_report
from tpctl.launch.rank_watch import RankWatch, await_sleep


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
    watch = RankWatch(tmp_path / "report.json", 3)
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


def test_no_rank_goes_on_before_all_are_forked(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path / "report.json", 2)
    fork = multiprocessing.get_context("fork")
    files = [tmp_path / f"error-{number}.json" for number in range(2)]
    children = [fork.Process(target=rank, args=(watch, number, 0, file)) for number, file in enumerate(files)]
    children[0].start()
    time.sleep(0.3)
    assert not files[0].with_suffix(".up").exists()
    children[1].start()
    while not all(file.with_suffix(".up").exists() for file in files):
        time.sleep(0.01)
    for file in files:
        file.touch()
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_a_fork_waits_until_threads_sleep() -> None:
    def busy() -> None:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 400_000)  # without Python's lock, but for its ends

    before = time.process_time()
    busy()
    needed = time.process_time() - before
    for patience, least in ((60.0, needed / 2), (needed / 10, needed / 10)):  # it waits no longer than it is told to
        thread = threading.Thread(target=busy)
        started = time.monotonic()
        thread.start()
        await_sleep(patience)
        assert time.monotonic() - started >= least
        thread.join()
    before = time.monotonic()
    await_sleep(60.0)
    assert time.monotonic() - before < 30
