"""Looks for faults: runs cases of a target, says of each what is wrong, and makes the ones that fail small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz import oracles
from tests.fuzz.case import Case, Outcome
from tests.fuzz.judge import Fault, judge
from tests.fuzz.runner import Runner
from tests.fuzz.targets import TARGETS


class Found(AssertionError):
    """A fault. Each signature has a class of its own, since hypothesis makes one example small for each class."""


class _Enough(BaseException):
    """Not to be caught by hypothesis: cases that hang are not made small at half a minute each."""


_HANGS = 2


@cache
def _class_of(signature: str) -> type[Found]:
    return type("Found", (Found,), {"__doc__": signature})


@dataclass
class Tally:
    """What came of a target's cases: exit codes of the last commands, the worst case, and faults by signature."""

    cases: int = 0
    codes: dict[int | None, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0
    faults: dict[str, tuple[int, Fault, Case]] = field(default_factory=dict)

    def add(self, case: Case, outcomes: list[Outcome], faults: list[Fault]) -> None:
        self.cases += 1
        code = outcomes[-1].code
        self.codes[code] = self.codes.get(code, 0) + 1
        self.seconds = max([self.seconds, *(outcome.seconds for outcome in outcomes)])
        self.peak = max([self.peak, *(outcome.peak for outcome in outcomes)])
        for fault in faults:
            count, *known = self.faults.get(fault.signature, (0, fault, case))
            self.faults[fault.signature] = (count + 1, *known)  # type: ignore[assignment]


def examine(runner: Runner, case: Case) -> tuple[list[Outcome], list[Fault]]:
    """Run a case; what its commands did, and what is wrong with that."""
    outcomes = runner.run(case)
    faults = [fault for outcome in outcomes for fault in judge(case, outcome)]
    return outcomes, faults or oracles.check(case, outcomes, runner.work)


def hunt(
    runner: Runner,
    target: str,
    cases: int,
    *,
    seed: int | None = None,
    only: str | None = None,
    raising: bool = True,
    note: Callable[[Case, list[Outcome], list[Fault]], None] = lambda case, outcomes, faults: None,
) -> None:
    """Run ``cases`` cases of ``target``.

    Args:
        seed: what they are drawn with; ``None`` draws the same ones every time.
        only: the signature of the one fault to look for.
        raising: end with the faults, each with a small case that shows it; else ``note`` has to see them.
        note: told of every case.

    Raises:
        Found: a fault; several are in an ``ExceptionGroup``.
    """

    hangs = 0

    @settings(
        max_examples=cases,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if raising else (Phase.generate,),
        print_blob=False,
        report_multiple_bugs=only is None,
    )
    @given(TARGETS[target])
    def run(case: Case) -> None:
        outcomes, faults = examine(runner, case)
        note(case, outcomes, faults)
        for fault in faults:
            if raising and only in (None, fault.signature):
                nonlocal hangs
                hangs += outcomes[-1].seconds > runner.seconds
                said = f"{fault.signature}: {fault.said}\n{case}"
                raise _Enough(said) if hangs > _HANGS else _class_of(fault.signature)(said)

    try:
        (run if seed is None else hypothesis.seed(seed)(run))()
    except _Enough as last:
        raise Found(str(last)) from None
