"""``tpctl chat`` and ``tpctl batch`` as a user runs them: real weights, real workers, several ranks on the CPU."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.patience import EXACT, PATIENCE, workers_of
from tpctl.checkpoint.sources import resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> str:
    return str(resolve("demo").folder)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tpctl", *arguments]


def tpctl(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, text=True, timeout=PATIENCE)


def write(file: Path, lines: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{parent}\n" in (entry / "status").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


LINES: list[dict[str, Any]] = [
    {"prompt": "The capital of France is", "max_tokens": 8},
    {"id": "chat", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16},
    {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.8, "seed": 11},
    {"prompt": "One, two, three, four,", "max_tokens": 24, "stop": ["seven"]},
    {"id": "penalty", "prompt": "la la la la", "max_tokens": 16, "repetition_penalty": 1.3},
    {"prompt": "x", "colour": "blue"},
    {"id": "nucleus", "prompt": "My favourite food", "max_tokens": 16, "temperature": 1, "top_p": 0.8, "top_k": 40},
]


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The rows of ``LINES``, computed one sequence at a time on one rank."""
    source = write(tmp_path_factory.mktemp("alone") / "in.jsonl", LINES)
    result = tpctl("batch", str(source), "--model", model, *EXACT, "--max-num-seqs", "1")
    assert result.returncode == 1, result.stderr  # one line is wrong on purpose
    return result.stdout


def test_rows(alone: str) -> None:
    found = rows(alone)
    assert [row["id"] for row in found] == [1, "chat", 3, 4, "penalty", 6, "nucleus"]
    assert "Paris" in found[0]["text"]
    assert "Paris" in found[1]["text"]
    assert found[3]["finish_reason"] == "stop"
    assert "seven" not in found[3]["text"]
    assert "six" in found[3]["text"]
    assert found[5]["error"].startswith("line 6: unknown field 'colour'")
    assert found[0]["finish_reason"] == "length"
    assert found[0]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("redirected", "answers", "said"),
    [
        (">/dev/full", "", "cannot write to standard output: No space left on device; with -o FILE finished rows are"),
        (">&-", "", "cannot write to standard output: closed; with -o FILE finished rows are kept for --resume"),
        (
            "-o /dev/full",
            "",
            "cannot write to /dev/full: No space left on device; name a file on a disk with -o",
        ),
        ("2>/dev/full", '"completion_tokens": 3', None),  # a log that takes no more ends nothing
    ],
)
def test_streams_that_fail(redirected: str, answers: str, said: str | None, small: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hello to all of you", "max_tokens": 3}])
    line = f'"{sys.executable}" -m tpctl batch {source} --model "{small}" {" ".join(EXACT)} {redirected}'
    env = {**os.environ, "TPCTL_WORKER": "tests.distributed.fast_worker"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert done.returncode == (said is not None)
    assert answers in done.stdout
    errors = [text for text in done.stderr.splitlines() if "is ready" not in text]
    assert len(errors) == (said is not None)  # and none of it twice
    assert said is None or errors[0].startswith(f"tpctl: {said}")


@pytest.mark.parametrize("tp_size", [2, 3])
def test_the_same_rows_together_and_on_several_ranks(
    model: str, alone: str, tmp_path: Path, tp_size: int, pytestconfig: pytest.Config
) -> None:
    if tp_size == 3 and not pytestconfig.getoption("--whole-grid"):
        pytest.skip("a size of --whole-grid")
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    result = tpctl("batch", str(source), "-o", str(out), "--model", model, "--tp", str(tp_size), *EXACT)
    assert result.returncode == 1
    assert out.read_text() == alone
    ready, done = result.stderr.splitlines()
    assert ready.endswith(f" is ready (tp {tp_size}, float32, sdpa attention on CPU)")
    assert re.fullmatch(r"7 prompts in .* preemptions, 1 error", done)
    assert result.stdout == ""


def test_stdin_to_stdout_under_preemption(small: str) -> None:
    lines = [{"prompt": f"Story {n}: the old man and the", "max_tokens": 40, "ignore_eos": True} for n in range(12)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    wide = tpctl("batch", "-", "--model", small, *EXACT, stdin=text)
    # 12 x 50 tokens want about 38 blocks of 16; in float32 on one rank a token takes 3 KiB.
    few = (*EXACT[:-1], "800KiB", "--block-size", "16", "--max-model-len", "128")
    narrow = tpctl("batch", "-", "--model", small, *few, stdin=text)
    assert (wide.returncode, narrow.returncode) == (0, 0), narrow.stderr
    assert narrow.stdout == wide.stdout
    assert len(rows(wide.stdout)) == 12
    assert re.search(r"[1-9]\d* preemptions", narrow.stderr), narrow.stderr
    assert " 0 preemptions" in wide.stderr


def test_interrupted_and_resumed(small: str, tmp_path: Path) -> None:
    lines = [{"prompt": f"Fact {n}:", "max_tokens": 12 if n < 4 else 150, "ignore_eos": True} for n in range(6)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    arguments = ("batch", str(source), "-o", str(out), "--model", small, *EXACT, "--max-num-seqs", "2")
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: partial.exists() and partial.read_text().count("\n") >= 4, "rows are kept")
    found = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert f"finished rows are kept in {partial}, go on with --resume" in said
    assert found
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found), "the workers are gone")
    again = tpctl(*arguments)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    resumed = tpctl(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"6 prompts in .*, [1-5] of them answered before", resumed.stderr)
    assert [row["id"] for row in rows(out.read_text())] == [1, 2, 3, 4, 5, 6]
    assert not partial.exists()


def test_a_killed_worker_is_one_line(small: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a", "max_tokens": 4000, "ignore_eos": True}])
    arguments = ("batch", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", small, "--tp", "2", *EXACT)
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)

    def ranks() -> list[int]:
        """The forked ones: they have the agent's environment."""
        return [pid for agent in children_of(process.pid) for pid in children_of(agent)]

    wait_until(lambda: len(ranks()) == 2, "both ranks are there")
    assert process.stderr is not None
    assert "is ready" in process.stderr.readline()
    os.kill(max(ranks()), signal.SIGKILL)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.fullmatch(r"tpctl: rank [01] was killed \(SIGKILL\).*\n", error)


def test_one_answer_from_two_ranks(model: str) -> None:
    result = tpctl("chat", model, "--tp", "2", "--temperature", "0", "-m", "What is the capital of France?", *EXACT)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout
    assert result.stdout.count("\n") == 1


def test_a_prompt_longer_than_the_model_allows(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCTL_WORKER", "tests.distributed.fast_worker")
    result = tpctl("chat", small, "-m", "why? " * 40, *EXACT, "--max-model-len", "32")
    assert result.returncode == 1
    assert re.fullmatch(r"tpctl: the message has \d+ tokens .*, but at most 31 leave room .*\n", result.stderr)


def test_talking_at_a_terminal(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns, an answer that is stopped with Ctrl-C, and Ctrl-D."""
    monkeypatch.setenv("TERM", "dumb")
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, command("chat", model, "--temperature", "0", *EXACT))
    seen = b""

    def until(text: bytes) -> bytes:
        nonlocal seen
        deadline = time.monotonic() + PATIENCE
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 1)[0]:
                try:
                    seen += os.read(terminal, 65536)
                except OSError:  # the other end is closed
                    seen += b"<end>"
        before, _, seen = seen.partition(text)
        return before

    until(b">>> ")
    os.write(terminal, b"What is the capital of France?\n")
    assert b"Paris" in until(b">>> ")
    os.write(terminal, b"And of Italy?\n")
    assert b"Rome" in until(b">>> ")
    os.write(terminal, b"Write a very long story about a dragon.\n")
    until(b"dragon.\r\n")
    until(b"dragon")
    os.write(terminal, b"\x03")
    assert b"(stopped)" in until(b">>> ")
    os.write(terminal, b"\x04")
    until(b"<end>")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
