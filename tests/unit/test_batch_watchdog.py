"""An engine that makes no steps is ended, and no other one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from tpctl.batch.watchdog import CPU_TIMEOUT, GPU_TIMEOUT, Watchdog, step_timeout
from tpctl.errors import EngineError, TpctlError
from tpctl.wire.report import EngineStats

TIMEOUT = 0.5
LONG = 5 * TIMEOUT


class FakeEngine:
    """Answers ``GetStats`` after ``answers``; ``reason``: why it was given up."""

    def __init__(self, answers: Callable[[], int]) -> None:
        self.answers = answers
        self.reason: TpctlError | None = None
        self.asked = 0
        self.ended = threading.Event()

    def stats(self) -> EngineStats:
        self.asked += 1
        return replace(EngineStats(*[0] * 13), steps=self.answers())

    def give_up(self, reason: TpctlError) -> None:
        self.reason = reason
        self.ended.set()


def never() -> int:
    threading.Event().wait()
    raise AssertionError


def failed() -> int:
    raise EngineError("rank 0 was killed")


@pytest.mark.parametrize("answers", [never, lambda: 7, failed], ids=["hangs", "turns without a step", "ended"])
def test_an_engine_without_steps_is_given_up(answers: Callable[[], int]) -> None:
    engine = FakeEngine(answers)
    with Watchdog(engine, lambda: (3, 4), TIMEOUT):
        assert engine.ended.wait(60)
    assert str(engine.reason).startswith("the engine made no step for 0.5 s and was ended; ")


def test_one_that_makes_steps_or_says_something_or_has_no_work_is_not() -> None:
    steps, rows = iter(range(10**6)), iter(range(10**6))
    prefills = FakeEngine(lambda: next(steps))
    speaks, idle = FakeEngine(never), FakeEngine(never)
    with (
        Watchdog(prefills, lambda: (0, 0), TIMEOUT),
        Watchdog(speaks, lambda: (next(rows), 0), TIMEOUT),
        Watchdog(idle, lambda: None, TIMEOUT),
    ):
        time.sleep(LONG)
    assert prefills.reason is None and speaks.reason is None and idle.reason is None
    assert prefills.asked > 3 and idle.asked == 0


def test_a_watcher_that_slept_blames_nobody() -> None:
    """As after a suspension, when the clock has gone on by hours."""
    now = iter(range(0, 10**9, 10**4))
    engine = FakeEngine(never)
    with Watchdog(engine, lambda: (3, 4), 60.0, clock=lambda: float(next(now))):
        time.sleep(3.5)
    assert engine.reason is None


def test_how_long_a_step_may_take() -> None:
    assert step_timeout("cuda", 16 << 30, 16384) == GPU_TIMEOUT
    assert step_timeout("cpu", 540_000_000, 4096) == CPU_TIMEOUT
    assert step_timeout("cpu", 16_000_000_000, 4096) > 4 * 3600 * 0.9  # 8 billion weights in bfloat16 on two slow cores
