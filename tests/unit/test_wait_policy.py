"""When OpenMP's threads spin: only while nobody else wants the cores."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch  # brings the OpenMP runtime into this process

from tpctl.engine import wait_policy
from tpctl.engine.wait_policy import SpinJudge, _Holder, _libgomp, waiting_time, watch_waiting

assert torch.__version__
needs_libgomp = pytest.mark.skipif(_libgomp() is None, reason="torch was built with another OpenMP runtime")


LOOK = 0.125  # seconds


def looks_until_spinning(judge: SpinJudge) -> int:
    looks = 1
    while not judge.look(0.0, LOOK):
        looks += 1
    return looks


def test_threads_spin_after_a_quiet_while_and_stop_at_the_first_look_that_is_not() -> None:
    judge = SpinJudge()
    assert not judge.spin
    assert looks_until_spinning(judge) == 2
    assert judge.look(0.01, LOOK)  # a little waiting is quiet
    assert not judge.look(0.05, LOOK)


def test_every_relapse_makes_it_wait_longer_until_it_was_quiet_for_long() -> None:
    judge = SpinJudge()
    waits = []
    for _ in range(7):
        waits.append(looks_until_spinning(judge))
        judge.look(LOOK, LOOK)
    assert waits == [2, 4, 8, 16, 32, 32, 32]
    looks_until_spinning(judge)
    for _ in range(32):
        judge.look(0.0, LOOK)
    judge.look(LOOK, LOOK)
    assert looks_until_spinning(judge) == 4


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def await_threads(count: int) -> None:
    deadline = time.monotonic() + 60
    while len(threads()) != count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_libgomp
def test_a_team_is_held_and_let_go() -> None:
    libgomp = _libgomp()
    assert libgomp is not None
    before = len(threads())
    holder = _Holder(libgomp, 3)
    await_threads(before + 3)
    holder.hold()
    holder.release()
    await_threads(before)
    holder.hold()
    await_threads(before + 3)
    holder.release()
    await_threads(before)


@needs_libgomp
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_a_user_who_has_decided_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert watch_waiting(2) is None


@needs_libgomp
def test_the_team_makes_one_thread_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    teams: list[int] = []
    monkeypatch.setattr(wait_policy, "WaitPolicy", lambda libgomp, team: teams.append(team))
    monkeypatch.setattr(wait_policy, "waiting_time", lambda: 1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for count in (8, 4, 1):
        watch_waiting(count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    watch_waiting(32)  # cores to spare
    assert teams == [2, 6]


def test_waiting_time_is_that_of_all_threads_in_seconds(tmp_path: Path) -> None:
    for name, text in {"9": "5 1500000000 7", "10": "5 500000000 7", "11": "", "12": "garbled"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    assert waiting_time(tmp_path) == 2.0
