"""What a run takes of grids of cases: coverings, others every day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.sampling import every_day, of_the_day, of_the_grid, sampled

DAYS = [f"2026-01-{day:02}" for day in range(1, 31)]


class Case:
    """A case as pytest collects it: its parameters, and the marks of its test."""

    def __init__(self, marks: list[Any], params: dict[str, Any]) -> None:
        self.marks, self.callspec = marks, SimpleNamespace(params=params)

    def iter_markers(self, name: str) -> list[Any]:
        return [mark for mark in self.marks if mark.name == name]

    def get_closest_marker(self, name: str) -> Any:
        return next(iter(self.iter_markers(name)), None)


def cases_of(*marks: Any) -> list[Any]:
    """Of a test with such marks (what ``pytest.mark`` gives), as pytest would make them."""
    plain = [getattr(mark, "mark", mark) for mark in marks]
    grids: list[tuple[list[str], Iterable[Any]]] = []
    for mark in plain:
        if mark.name == "parametrize":
            names, values = mark.args
            alone = isinstance(names, str)
            grids.append(([names] if alone else list(names), [(one,) if alone else one for one in values]))
    every = [name for names, _ in grids for name in names]
    rows = product(*(values for _, values in grids))
    return [Case(plain, dict(zip(every, chain.from_iterable(row), strict=True))) for row in rows]


def taken(cases: list[Any]) -> list[dict[str, Any]]:
    return params_of(of_the_day(of_the_grid(cases)))


def params_of(cases: list[Any]) -> list[dict[str, Any]]:
    return [case.callspec.params for case in cases]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda day: monkeypatch.setenv("TPCTL_TEST_DAY", day)


NAMES = pytest.mark.parametrize("name", [f"{kind}-{number}" for kind in "abcde" for number in range(3)])
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4])


def kind(name: str) -> str:
    return name[0]


def test_a_grid_meets_each_value_so_often() -> None:
    cases = cases_of(NAMES, SIZES)
    for times in (1, 2):
        found = params_of(sampled(cases, times))
        assert set(Counter(one["name"] for one in found).values()) == {times}
        assert min(Counter(one["size"] for one in found).values()) >= times
        assert len({tuple(one.values()) for one in found}) == len(found) == 15 * times


def test_every_day_meets_each_value(on: Callable[[str], None]) -> None:
    cases = cases_of(NAMES, SIZES, pytest.mark.grid(1, daily=True))
    seen = set()
    for day in DAYS:
        on(day)
        found = taken(cases)
        assert len({one["name"] for one in found}) == len(found) == 15
        assert {one["size"] for one in found} == {1, 2, 3, 4}
        seen |= {tuple(one.values()) for one in found}
    assert len(seen) == len(cases)


def test_of_those_alike_one_a_day_and_each_has_its_turn(on: Callable[[str], None]) -> None:
    cases = cases_of(NAMES, SIZES, pytest.mark.grid(1, daily=True, alike={"name": kind}))
    for first in range(0, len(DAYS), 3):
        names = set()
        for day in DAYS[first : first + 3]:
            on(day)
            found = taken(cases)
            assert sorted(kind(one["name"]) for one in found) == list("abcde")
            assert {one["size"] for one in found} == {1, 2, 3, 4}
            names |= {one["name"] for one in found}
        assert len(names) == 15


def test_what_is_listed_together_is_met_apart(on: Callable[[str], None]) -> None:
    """Of pairs that are listed, each would be a value of its own."""
    pairs = pytest.mark.parametrize(("name", "size"), [(name, size) for name in "abcde" for size in (1, 2, 3, 4)])
    for day in DAYS:
        on(day)
        found = taken(cases_of(pairs, pytest.mark.grid(1, daily=True, apart=True)))
        assert len(found) == 5
        assert {one["name"] for one in found} == set("abcde") and {one["size"] for one in found} == {1, 2, 3, 4}
    assert len(taken(cases_of(pairs, pytest.mark.grid(1, daily=True)))) == 20


def test_a_sample_of_which_a_day_has_a_part_is_run_whole(on: Callable[[str], None]) -> None:
    """So that each value is met in so many days as there are parts."""
    cases = cases_of(NAMES, SIZES, pytest.mark.grid(1, daily=True), pytest.mark.daily(2))
    whole = []
    for day in DAYS:
        on(day)
        whole.append(taken(cases))
        assert len(whole[-1]) in (7, 8)
    pairs = [{one["name"] for one in (*first, *second)} for first, second in pairwise(whole)]
    assert sum(len(names) == 15 for names in pairs) >= len(DAYS) // 2 - 1


def test_a_day_meets_every_family_size_and_way(on: Callable[[str], None]) -> None:
    """Of the tests that hold families against transformers; docs/families.md says so."""
    from tests.unit import test_families_tokens, test_models, test_models_attention, test_models_mixtures

    logits, tokens = "test_logits_equal_transformers", "test_greedy_tokens_equal_transformers"
    for module, test in (
        (test_models, logits),
        (test_models_mixtures, logits),
        (test_models_attention, logits),
        (test_families_tokens, tokens),
    ):
        marks = getattr(module, test).pytestmark
        cases = cases_of(*marks)
        alike = next(mark for mark in marks if mark.name == "grid").kwargs.get("alike", {})
        every = {name: {alike.get(name, str)(case.callspec.params[name]) for case in cases} for name in _names(cases)}
        for day in DAYS[::5]:
            on(day)
            found = taken(cases)
            assert len(found) < len(cases) / 2
            for name, values in every.items():
                assert {alike.get(name, str)(one[name]) for one in found} == values, (module.__name__, day, name)


def _names(cases: list[Any]) -> list[str]:
    return list(cases[0].callspec.params)


def test_a_case_of_its_own_path_is_taken_every_day(on: Callable[[str], None]) -> None:
    cases = cases_of(NAMES, SIZES, pytest.mark.daily(4))
    for case in cases[:2]:
        case.marks = [*case.marks, pytest.mark.always.mark]
    others = set()
    for day in DAYS[:4]:
        on(day)
        found = every_day(cases, of_the_day)
        assert found[:2] == cases[:2] and len(found) < 20
        others |= {*found[2:]}
    assert others == {*cases[2:]}
    assert every_day(cases[:2], of_the_day) == cases[:2]
