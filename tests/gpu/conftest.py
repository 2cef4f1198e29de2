"""Under Triton's interpreter, where a kernel takes seconds, and where kernels are only compiled, which takes as long,
grids of cases are sampled (of tests marked ``daily`` in parts, by the day); on GPUs they run whole, unless
``--sampled-grid`` is given. Of a sample, and of a test with few cases, a third is run a day, not of all tests those of
one place, which may be of one way (graphs, say), and besides them all that are marked ``always``; of what is only
compiled the sample is another every day, too."""

from __future__ import annotations

from importlib.util import find_spec
from zlib import crc32

import pytest
import torch

from tests.gpu.here import INTERPRET
from tests.sampling import by_test, every_day, leave_out, of_the_day, sampled, today

_TIMES = 1
"""How often each value of each parameter is run at least, where its grid has as many cases of it."""
_SMALL = 6
"""Cases that a test may have before it is sampled."""
_DAYS = 3
"""In which all of a sample, or of few cases, is run, where ``daily`` says nothing else."""


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRET and find_spec("triton"):
        from tests.gpu.interpreter import hasten

        hasten()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole = torch.cuda.is_available() and not INTERPRET and not config.getoption("--sampled-grid")
    if whole or config.getoption("--whole-grid"):
        return
    tests = by_test(item for item in items if item.path.parent.name == "gpu").values()
    kept = {one for cases in tests for one in every_day(cases, _chosen)}
    leave_out(config, items, {one for cases in tests for one in cases} - kept)


def _chosen(cases: list[pytest.Item]) -> list[pytest.Item]:
    return of_the_day(_few(cases))


def _few(cases: list[pytest.Item]) -> list[pytest.Item]:
    compiled = cases[0].path.name.startswith("test_compile")
    if len(cases) > _SMALL:
        cases = sampled(cases, _TIMES, apart=compiled, turn=today() if compiled else 0)
    if cases[0].get_closest_marker("daily") or not (INTERPRET or compiled):
        return cases
    days = min(_DAYS, len(cases))
    return cases[(today() + crc32(cases[0].nodeid.partition("[")[0].encode())) % days :: days]
