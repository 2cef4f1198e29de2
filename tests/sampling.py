"""Grids of cases of which a run takes a few: each value of each parameter some times, beside other values."""

from __future__ import annotations

import datetime
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import pytest


def by_test(items: Iterable[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The cases of each test that has parameters."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
    return tests


def leave_out(config: pytest.Config, items: list[pytest.Item], left_out: set[pytest.Item]) -> None:
    """Take ``left_out`` from the collected ``items``."""
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in left_out]


def every_day(cases: list[pytest.Item], choose: Callable[[list[pytest.Item]], list[pytest.Item]]) -> list[pytest.Item]:
    """Of a test's cases those marked ``always``, since no other takes their path, and what ``choose`` takes of the
    others."""
    others = [case for case in cases if case.get_closest_marker("always") is None]
    return [case for case in cases if case not in others] + (choose(others) if others else [])


def today() -> int:
    """The day that chooses, as a number: that of ``TPCTL_TEST_DAY`` (2026-11-30), which a run sets for its processes,
    else this one."""
    day = os.environ.get("TPCTL_TEST_DAY")
    return (datetime.date.fromisoformat(day) if day else datetime.date.today()).toordinal()


def of_the_day(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Of a test marked ``daily(share)`` one case of so many, others every day; else all."""
    mark = cases[0].get_closest_marker("daily") if cases else None
    if mark is None:
        return cases
    return [case for place, case in enumerate(cases) if (place + today()) % mark.args[0] == 0]


def of_the_grid(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Of a test marked ``grid(times)`` each value of each parameter so many times, where as many cases have it; else
    all. Of one that is marked ``daily(share)``, too, the same for so many days as it takes to run all of them."""
    if (mark := cases[0].get_closest_marker("grid")) is None:
        return cases
    share = cases[0].get_closest_marker("daily")
    turn = today() // (1 if share is None else share.args[0]) if mark.kwargs.get("daily") else 0
    apart = mark.kwargs.get("apart", False)
    return sampled(of_those_alike(cases, mark.kwargs.get("alike", {}), turn), mark.args[0], apart=apart, turn=turn)


def of_those_alike(
    cases: list[pytest.Item], alike: Mapping[str, Callable[[Any], Hashable]], turn: int
) -> list[pytest.Item]:
    """The cases of one value of each group, another one each turn: ``alike`` says for a parameter which group a value
    is in."""
    for name, group in alike.items():
        groups: dict[Hashable, list[Any]] = defaultdict(list)
        for case in cases:
            value = _params(case)[name]
            if value not in groups[group(value)]:
                groups[group(value)].append(value)
        taken = [values[turn % len(values)] for values in groups.values()]
        cases = [case for case in cases if _params(case)[name] in taken]
    return cases


def sampled(cases: list[pytest.Item], times: int, *, apart: bool = False, turn: int = 0) -> list[pytest.Item]:
    """Few of ``cases``, the same in every run: each value of each parameter ``times`` times, where as many have it.

    Greedy: the case taken next is the one with the most values that are still wanted, and among those the one whose
    pairs of values have been seen least.

    Args:
        apart: parameters that are listed together count as one each, not as one in all.
        turn: another number takes others.
    """
    values = {case: _values(case, apart) for case in cases}
    held = Counter(value for own in values.values() for value in own)
    wanted = {value: min(times, count) for value, count in held.items()}
    pairs: Counter[tuple[object, object]] = Counter()
    taken: list[pytest.Item] = []
    first = 7 * turn % len(cases)  # the day after takes no neighbour
    left = cases[first:] + cases[:first]
    while any(wanted.values()):
        gains = {case: sum(wanted[value] > 0 for value in values[case]) for case in left}
        most = max(gains.values())
        best = min((case for case in left if gains[case] == most), key=lambda case: _seen(pairs, values[case]))
        left.remove(best)
        taken.append(best)
        for one in values[best]:
            wanted[one] = max(0, wanted[one] - 1)
            pairs.update((one, other) for other in values[best])
    return taken


def _seen(pairs: Mapping[tuple[object, object], int], values: list[tuple[str, str]]) -> int:
    """How often pairs of these values have been taken."""
    return sum(pairs.get((one, other), 0) for one in values for other in values)


def _values(case: pytest.Item, apart: bool) -> list[tuple[str, str]]:
    """What ``case`` has of each ``parametrize`` (its names and their values, those of several names as one unless they
    are taken ``apart``), and of each fixture with parameters."""
    params = _params(case)
    found = []
    for mark in [] if apart else case.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.append((str(names), repr([params.pop(name.strip()) for name in names])))
    return found + [(name, repr(value)) for name, value in params.items()]


def _params(case: pytest.Item) -> dict[str, Any]:
    return dict(case.callspec.params)  # type: ignore[attr-defined]
