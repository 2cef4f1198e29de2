"""What several test modules need once."""

from __future__ import annotations

import datetime
import gc
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.sampling import by_test, every_day, leave_out, of_the_day, of_the_grid, today
from tpctl.checkpoint.sources import ResolvedSource, resolve

# Where the tests run in the background of a shell, SIGINT is ignored, and every process they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until all modules are imported, and every test is collected

# A busy machine is no failure: nothing here is judged by the clock.
settings.register_profile("tpctl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpctl")


def pytest_addoption(parser: pytest.Parser) -> None:
    every = (
        "every case, under Triton's interpreter, too (tests/gpu), or where the day chooses (families and formats), "
        "and real weights at full length"
    )
    parser.addoption("--whole-grid", action="store_true", help=every)
    parser.addoption("--sampled-grid", action="store_true", help="of kernels' grids of cases a sample, on GPUs too")
    parser.addoption("--fuzz-minutes", type=float, help="fuzz for so long with new cases (of tests/fuzz)")
    parser.addoption("--fuzz-seed", type=int, help="fuzz with the cases of an earlier run, whose seed this is")


def pytest_configure(config: pytest.Config) -> None:
    """One of several processes that share the cores (``-n``) computes in one thread: waiting threads spin. They take
    files in our order, not those of most tests first."""
    # Processes of one run that begin on both sides of midnight must not collect different tests.
    os.environ.setdefault("TPCTL_TEST_DAY", datetime.date.fromordinal(today()).isoformat())
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


LONG = (
    *("test_batch_job", "test_chat_batch", "test_real_weights", "test_launch_failures", "test_launch", "test_slurm"),
    *("test_nodes", "test_ray", "test_batch_hosts", "test_chat_terminal", "test_fuzz", "test_examples"),
    *("test_command_line", "test_quality", "test_shared_memory", "test_real_forms"),
)
"""Files that take long, the longest first: begun last, one of them would keep a process for itself."""


def places(files: Iterable[Path]) -> dict[Path, float]:
    """Where each file stands: those that compute (units) in their order, those that mostly wait for engines, hosts and
    clusters among them, the longest first. Processes that share few cores then seldom all compute, or all wait."""
    known = list(dict.fromkeys(files))
    units = [file for file in known if file.parent.name == "unit"]
    others = sorted((file for file in known if file.parent.name != "unit"), key=_length)
    return {file: number / len(part) for part in (units, others) for number, file in enumerate(part)}


def _length(file: Path) -> int:
    return LONG.index(file.stem) if file.stem in LONG else len(LONG)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests marked ``grid(times)``, take each value of each parameter so often, of those marked ``daily(share)``
    one case of so many, besides those marked ``always``; and all with ``--whole-grid``."""
    place = places(item.path for item in items)
    items.sort(key=lambda item: place[item.path])
    if config.getoption("--whole-grid"):
        return
    out: set[pytest.Item] = set()
    for cases in by_test(items).values():
        out.update(set(cases) - set(every_day(cases, _chosen)))
    leave_out(config, items, out)


def _chosen(cases: list[pytest.Item]) -> list[pytest.Item]:
    taken = of_the_grid(cases)
    if cases[0].path.parent.name == "gpu":  # which chooses for itself, of what it has sampled
        return taken
    return of_the_day(taken)


def pytest_collection_finish() -> None:
    """What modules and collected tests hold is never looked through for garbage, and what tests make seldom is: both
    took a tenth of the processors' time."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


@pytest.fixture(scope="session")
def demo() -> ResolvedSource:
    """The demo model's checkpoint, in the cache; the first run on a machine fetches it.

    ``TPCTL_TEST_MODEL`` names where to find the same model on a machine that can fetch nothing.
    """
    return resolve(os.environ.get("TPCTL_TEST_MODEL", "demo"))
