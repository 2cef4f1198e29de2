"""Processes that share work: all of it is done, whatever fails, and none is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tpctl.engine.runners.forked import Pool


def done(folder: Path) -> list[int]:
    return sorted(int(file.name) for file in folder.iterdir())


def test_more_work_than_waits_in_a_socket(tmp_path: Path) -> None:
    def work(number: int, text: str) -> None:
        (tmp_path / str(number)).write_text(f"{os.getpid()} {len(text)}")

    pool = Pool(work, 3)
    for number in range(300):
        pool.put(number, "x" * 3000)
    assert pool.join() == 0
    assert done(tmp_path) == list(range(300))
    pids = {(tmp_path / str(number)).read_text().split()[0] for number in range(300)}
    assert 1 < len(pids) <= 3 and str(os.getpid()) not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_no_process_without_work() -> None:
    pool = Pool(lambda: pytest.fail("nothing was put"), 4)
    assert pool.join() == 0 and not pool._processes


def test_what_fails_is_counted_and_the_rest_is_done(tmp_path: Path) -> None:
    def work(number: int) -> None:
        if number % 5 == 0:
            raise ValueError(number)
        (tmp_path / str(number)).touch()

    pool = Pool(work, 2)
    for number in range(20):
        pool.put(number)
    assert pool.join() == 4
    assert done(tmp_path) == [number for number in range(20) if number % 5]


@pytest.mark.parametrize("most", [1, 2])
def test_a_process_that_dies_takes_its_own_work_with_it(most: int, tmp_path: Path) -> None:
    def work(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        (tmp_path / str(number)).touch()

    pool = Pool(work, most)
    for number in range(8):
        pool.put(number)
    failed = pool.join()
    assert failed == 8 - len(done(tmp_path)) and 3 not in done(tmp_path)
    assert 1 <= failed <= 2  # what it was at, and what waited for it


def test_the_death_of_a_process_that_has_nothing_to_do_fails_nothing(tmp_path: Path) -> None:
    def work(number: int) -> None:
        time.sleep(0.2 * number)
        (tmp_path / str(number)).touch()

    pool = Pool(work, 2)
    pool.put(0)
    pool.put(1)
    while not (tmp_path / "0").exists():
        time.sleep(0.01)
    pool._go_on(0.1)
    idle = pool._processes[0].pid
    os.kill(idle, signal.SIGKILL)
    os.waitid(os.P_PID, idle, os.WEXITED | os.WNOWAIT)
    for number in range(2, 6):
        pool.put(number)
    assert pool.join() == 0 and done(tmp_path) == list(range(6))
