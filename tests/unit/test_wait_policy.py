"""When OpenMP's threads spin: only while nobody else wants the cores."""

from __future__ import annotations

import os
import queue
import time
from pathlib import Path

import pytest
import torch  # brings the OpenMP runtime into this process

from tpctl.engine import wait_policy
from tpctl.engine.wait_policy import IdleTeam, SpinJudge, WaitPolicy, _idle_team, _libgomp, waiting_time, watch_waiting

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
    team = IdleTeam(libgomp, 3)
    for _ in range(2):
        team.hold()
        team.hold()
        await_threads(before + 3)
        team.release()
        team.release()
        await_threads(before)


@needs_libgomp
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_a_user_who_has_decided_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert _idle_team(8) is not None
    monkeypatch.setenv(name, "1")
    assert _idle_team(8) is None
    assert watch_waiting(8) is None


@needs_libgomp
@pytest.mark.parametrize(
    ("cores", "threads", "size"), [(8, 8, 2), (8, 4, 6), (2, 1, None), (64, 32, None), (4, 8, None)]
)
def test_the_team_makes_one_thread_more_than_cores(
    cores: int, threads: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    team = _idle_team(threads)
    assert (team and team._size) == size


def test_ranks_are_told_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True, True, False])
    monkeypatch.setattr(SpinJudge, "look", lambda judge, waited, elapsed: next(answers))
    told: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def tell(spin: bool) -> None:
        told.put(spin)
        if told.qsize() == 5:
            policy.rest()

    monkeypatch.setattr(wait_policy, "_LOOK", 0.01)
    policy = WaitPolicy(None, tell)
    while told.qsize() < 5:
        time.sleep(0.01)
    assert [told.get() for _ in range(5)] == [False, False, True, True, False]


def test_waiting_time_is_that_of_all_threads_in_seconds(tmp_path: Path) -> None:
    for name, text in {"9": "5 1500000000 7", "10": "5 500000000 7", "11": "", "12": "garbled"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    assert waiting_time(tmp_path) == 2.0
