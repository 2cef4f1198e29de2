"""A fixed number of fuzzed cases, the same every time, or ``--fuzz-minutes`` of new ones.

A fault found by ``--fuzz-minutes`` is seen again with the ``--fuzz-seed`` that is printed with it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.described import described
from tests.fuzz import oracles
from tests.fuzz.bases import WORDS
from tests.fuzz.case import Case, Outcome
from tests.fuzz.commands import BATCH, CHAT, shard_and_prove
from tests.fuzz.hunt import examine, hunt
from tests.fuzz.runner import Runner
from tests.fuzz.sandbox import PYTHON
from tests.fuzz.targets import TARGETS
from tpctl.arch.config import ModelConfig

CASES = {"config": 30, "index": 20, "manifest": 15, "template": 15}
"""Cases of a target in a run of all tests; ``_OTHERS`` where it is not named."""
_OTHERS = 25
_ROUND = 100


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def impatient() -> Iterator[Runner]:
    with Runner(seconds=5.0) as runner:
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
        ("import time; time.sleep(60)", "took more than 5 s"),
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
def test_each_kind_of_fault_is_seen(runner: Runner, impatient: Runner, code: str, kind: str) -> None:
    """Of a command that has it."""
    _, faults = examine(impatient if "sleep" in code else runner, Case("config", "llama", (), ((PYTHON, code),)))
    assert kind in [fault.kind for fault in faults]


@pytest.mark.slow
def test_a_wrong_result_is_seen(runner: Runner) -> None:
    """By each oracle, of a result that was right until one thing in it was changed."""

    def kinds(case: Case, outcomes: list[Outcome]) -> list[str]:
        brief = [replace(outcome, seconds=0.0) for outcome in outcomes]  # as on a machine that does nothing else
        return [fault.kind for fault in oracles.check(case, brief, runner.work)]

    case = Case("tokenizer", WORDS, (), (BATCH,))
    (outcome,) = runner.run(case)
    assert kinds(case, [outcome]) == []
    outcome.engine["requests"][1]["token_ids"].pop()
    assert kinds(case, [outcome]) == ["tokens unlike transformers"]
    rows = (runner.work / "rows.jsonl").read_text().splitlines(keepends=True)
    for changed, kind in (
        (rows[:2], "rows are missing"),
        ([rows[1], rows[0], rows[2]], "row of another id"),
        ([rows[0].replace('"text"', '"error"'), *rows[1:]], "exit code unlike the rows"),
        ([rows[0].replace("5", "NaN"), *rows[1:]], "rows that are no JSON"),
    ):
        (runner.work / "rows.jsonl").write_text("".join(changed))
        assert kind in kinds(case, [outcome])

    case = Case("header", "mistral", (), shard_and_prove(2))
    outcomes = runner.run(case)
    raw = bytearray((runner.work / "merged" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (runner.work / "merged" / "model.safetensors").write_bytes(raw)
    (runner.work / "model" / "model.safetensors").write_bytes(raw[:-1])
    assert {"safetensors refuses the file", "merged files differ"} <= set(kinds(case, outcomes))

    case = Case("config", "llama", (), (CHAT,))
    outcomes = runner.run(case)
    outcomes[0].engine["requests"][0]["sampling"]["top_k"] = 41
    assert kinds(case, outcomes) == ["sampling unlike generation_config.json"]
    ours = described(ModelConfig.load(runner.work / "model"))
    ours.head_dim = 7
    theirs = oracles.read_by_transformers(runner.work / "model", ours)
    assert [key for key, (mine, their) in theirs.items() if mine != their] == ["head_dim", "rotary_dim"]
