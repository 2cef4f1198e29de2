"""An engine that lives and does nothing: a replica ends it, so that others can answer what it holds.

Its process is there, and the replica's signs of life move, but a rank waits for something that never comes. What tells
is the engine's own count of steps, not the time of day, nor how long an answer takes: a long prompt is computed in
parts, each of which is a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from tpctl.errors import EngineError, TpctlError
from tpctl.wire.report import EngineStats

GPU_TIMEOUT = 300.0
"""Seconds that a step may take on GPUs: the slowest ones, which compile kernels, take a minute."""

CPU_TIMEOUT = 600.0
"""The same on a CPU, at least."""

_SLOWEST_CPU = 5e9  # multiplications and additions a second, of a step of many tokens: a core has 4 to 20 times that

_LOOK = 1.0  # seconds between looks
_LOOKS = 16  # in a timeout, at least


def step_timeout(device: str, weight_bytes: int, tokens: int) -> float:
    """Seconds that no step takes: on a CPU by a rank's weights, each of which a step of so many ``tokens`` multiplies
    with each of them (two operations, and two bytes a weight at least; longer ones leave room for attention)."""
    if device != "cpu":
        return GPU_TIMEOUT
    return max(CPU_TIMEOUT, weight_bytes * tokens / _SLOWEST_CPU)


class Watched(Protocol):
    """What is watched: an ``EngineClient``."""

    def stats(self) -> EngineStats: ...

    def give_up(self, reason: TpctlError) -> None: ...


class Watchdog:
    """Two threads, until the context is left: one asks the engine how many steps it has made, which a hung one does
    not answer; the other one looks whether anything has moved."""

    def __init__(
        self,
        engine: Watched,
        at_work: Callable[[], tuple[int, ...] | None],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to watch.

        Args:
            at_work: counts of what has come out of the engine; ``None`` while it has nothing to do.
            timeout: seconds without a step, or anything that comes out, after which the engine is given up.
            clock: seconds, counted by this process alone.
        """
        self._engine = engine
        self._at_work = at_work
        self._timeout = timeout
        self._clock = clock
        self._look = min(_LOOK, timeout / _LOOKS)
        self._steps = 0
        self._ended = threading.Event()

    def __enter__(self) -> None:
        for target in (self._ask, self._watch):
            threading.Thread(target=target, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _ask(self) -> None:
        with suppress(TpctlError):  # whoever waits for answers is told why it ended
            while not self._ended.wait(_LOOKS * self._look / 4):
                if self._at_work() is not None:
                    self._steps = self._engine.stats().steps

    def _watch(self) -> None:
        silent, before, looked = 0.0, None, self._clock()
        while not self._ended.wait(self._look):
            now = self._clock()
            # A longer gap between two looks says that this process slept, and perhaps the engine with it.
            silent += min(max(now - looked, 0.0), self._look)
            looked = now
            done = self._at_work()
            found = None if done is None else (self._steps, *done)
            if found is None or found != before:
                silent, before = 0.0, found
            if silent >= self._timeout:
                self._engine.give_up(
                    EngineError(
                        f"the engine made no step for {self._timeout:g} s and was ended; if its steps take that long, "
                        "raise --step-timeout"
                    )
                )
                return
