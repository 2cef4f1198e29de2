"""Wrong input is answered with one line, and touches nothing.

``docs/bad-input.md`` shows the lines of the cases that have a title, and is compared with what the commands say. After
a wanted change: ``python -m tests.unit.test_bad_input > docs/bad-input.md``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.bad_folders import prepare
from tests.unit.bad_input import CASES, Answer, Case, local_answer
from tests.unit.downloads import environment, files
from tests.unit.hub_server import Hub, serving

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "bad-input.md"
Ask = Callable[[Case], Answer]


@contextmanager
def asking(folder: Path) -> Iterator[Ask]:
    """What is said to a case in ``folder``. Those that want a Hub are asked in one process beside a local one, since
    huggingface_hub reads its settings once; it starts with the first of them."""
    with tempfile.TemporaryDirectory() as caches, serving(Hub()) as hub:
        hub.add("org/whole", files(str(folder / "model")))
        hub.add("org/shards", files(str(folder / "shards")))
        child: subprocess.Popen[str] | None = None

        def ask(case: Case) -> Answer:
            nonlocal child
            if not case.hub:
                return local_answer(case.command, folder)
            if child is None:
                child = subprocess.Popen(
                    [sys.executable, "-m", "tests.unit.bad_input"],
                    cwd=ROOT,
                    env={**environment(hub, Path(caches)), "HF_HUB_DISABLE_XET": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            assert child.stdin is not None and child.stdout is not None
            hub.refusals = [] if case.refusal is None else [case.refusal]
            child.stdin.write(json.dumps([str(folder), case.command]) + "\n")
            child.stdin.flush()
            answer = Answer(**json.loads(child.stdout.readline()))
            return Answer(answer.code, answer.out, answer.err.replace(hub.url, "https://huggingface.co"))

        try:
            yield ask
        finally:
            if child is not None:
                child.communicate()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def line(what: str, command: str, answer: Answer) -> str:
    said = answer.err.strip().removeprefix("tpctl: ")
    return f"| {cell(what)} | `tpctl {command}` | {answer.code} | {cell(said)} |"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def ask(inputs: Path) -> Iterator[Ask]:
    with asking(inputs) as asked:
        yield asked


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=[case.title or case.command for case in CASES])
def test_bad_input_is_one_line_and_touches_nothing(case: Case, inputs: Path, ask: Ask) -> None:
    before = contents(inputs)
    answer = ask(case)
    assert answer.out == "" and answer.err.count("\n") == 1 and answer.err.startswith("tpctl: "), answer
    if case.title:
        wanted = line(case.title, case.command, answer)
        if "--help`" in answer.err:  # Typer's own words, which differ between its versions
            wanted = wanted.partition(": ")[0]
        assert answer.code in (1, 2)
        assert any(row.startswith(wanted) for row in PAGE.read_text(encoding="utf-8").splitlines()), wanted
    else:
        assert answer.code == case.code, answer
        assert case.said.lower() in answer.err.lower(), answer
    assert contents(inputs) == before


def test_the_page_has_no_other_rows() -> None:
    rows = re.findall(r"^\| (.+?) \| `tpctl", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [case.title for case in CASES if case.title]


def page() -> str:
    lines = [
        "# What wrong input is answered with",
        "",
        "One line on stderr, nothing on stdout, nothing half-written; exit code 2 where the command line itself is",
        "wrong, else 1. Made and checked by `tests/unit/test_bad_input.py`; `bad_folders.py` makes the folders.",
        "",
        "| what is wrong | command | exit code | answer |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        with asking(Path(folder)) as ask:
            lines += [line(case.title, case.command, ask(case)) for case in CASES if case.title]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
