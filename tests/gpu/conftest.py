"""Under Triton's interpreter, where a kernel takes seconds, and where kernels are only compiled, which takes as long,
grids of cases are sampled; on GPUs they run whole, unless ``--sampled-grid`` is given."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from tests.gpu.here import INTERPRET

_TIMES = 2
"""How often each value of each parameter is run at least, where its grid has as many cases of it."""
_SMALL = 6
"""Cases that a test may have before it is sampled."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole = torch.cuda.is_available() and not INTERPRET and not config.getoption("--sampled-grid")
    if whole or config.getoption("--whole-grid"):
        return
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent.name == "gpu" and hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
    left_out = {item for cases in tests.values() if len(cases) > _SMALL for item in cases} - {
        item for cases in tests.values() for item in sampled(cases)
    }
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in left_out]


def sampled(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few of ``cases``, the same in every run: each value of each parameter ``_TIMES`` times, beside other values.

    Greedy: the case taken next is the one with the most values that are still wanted, and among those the one whose
    pairs of values have been seen least.
    """
    values = {case: [_value(case, mark) for mark in case.iter_markers("parametrize")] for case in cases}
    held = Counter(value for own in values.values() for value in own)
    wanted = {value: min(_TIMES, count) for value, count in held.items()}
    pairs: Counter[tuple[object, object]] = Counter()
    taken: list[pytest.Item] = []
    left = list(cases)
    while any(wanted.values()):
        best = max(
            left,
            key=lambda case: (
                sum(wanted[value] > 0 for value in values[case]),
                -sum(pairs[one, other] for one in values[case] for other in values[case]),
            ),
        )
        left.remove(best)
        taken.append(best)
        for one in values[best]:
            wanted[one] = max(0, wanted[one] - 1)
            pairs.update((one, other) for other in values[best])
    return taken


def _value(case: pytest.Item, mark: pytest.Mark) -> tuple[str, str]:
    """What ``case`` has of one ``parametrize``: its names and their values, those of several names as one."""
    names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
    params = case.callspec.params  # type: ignore[attr-defined]
    return str(names), repr([params[name.strip()] for name in names])
