"""A fixed number of fuzzed cases, the same every time, or ``--fuzz-minutes`` of new ones.

A fault found by ``--fuzz-minutes`` is seen again with the ``--fuzz-seed`` that is printed with it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import pytest

from tests.fuzz.case import Case
from tests.fuzz.hunt import examine, hunt
from tests.fuzz.runner import Runner
from tests.fuzz.sandbox import PYTHON
from tests.fuzz.targets import BATCH, CHAT, TARGETS, shard_and_prove

CASES = {"options": 120, "jsonl": 120, "template": 60}
"""Cases of a target in a run of all tests; ``_OTHERS`` where it is not named."""
_OTHERS = 90
_ROUND = 100


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def impatient() -> Iterator[Runner]:
    with Runner(seconds=2.0) as runner:
        yield runner


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_is_answered_wrongly(runner: Runner, target: str, request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--fuzz-minutes")
    seed = request.config.getoption("--fuzz-seed")
    if minutes is None and seed is None:
        hunt(runner, target, CASES.get(target, _OTHERS))
        return
    until = time.monotonic() + 60 * (minutes or 0.0) / len(TARGETS)
    while True:
        drawn = secrets.randbits(32) if seed is None else seed
        print(f"{target}: --fuzz-seed {drawn}", flush=True)
        hunt(runner, target, _ROUND, seed=drawn)
        if seed is not None or time.monotonic() >= until:
            return


@pytest.mark.slow
def test_what_is_right_is_taken(runner: Runner) -> None:
    """A harness in which all is refused would find nothing."""
    for base, commands in (("llama", shard_and_prove(2)), ("phi3", (CHAT,)), ("words", (BATCH,))):
        outcomes, faults = examine(runner, Case("config", base, (), commands))
        assert ([outcome.code for outcome in outcomes], faults) == ([0] * len(commands), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("import time; time.sleep(60)", "took more than 2 s"),
        ("kept = b'x' * 1_100_000_000", "memory"),
        ("kept = b'x' * 10_000_000_000", "MemoryError"),
        ("import os; os.abort()", "died of SIGABRT"),
        ("open('/written', 'w')", "written elsewhere"),
        ("open('stray', 'w')", "files touched"),
        ("raise SystemExit(3)", "exit code"),
        ("import sys; sys.stderr.write('tpctl: a\\x1b[31m\\n'); sys.exit(1)", "control characters in a message"),
        ("import sys; sys.exit(1)", "no message"),
    ],
)
def test_each_kind_of_fault_is_seen(impatient: Runner, code: str, kind: str) -> None:
    """Of a command that has it."""
    _, faults = examine(impatient, Case("config", "llama", (), ((PYTHON, code),)))
    assert kind in [fault.kind for fault in faults]
