"""``tpctl batch`` as a user runs it, from and into what others read: with the demo model, and with several replicas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.unit.batch_formats_run import read_lines, write_lines
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.sharding.cache import ensure_sharded

pytestmark = pytest.mark.slow
PATIENCE = 300.0


@pytest.fixture(scope="module")
def model(demo: ResolvedSource) -> str:
    ensure_sharded(demo, 1)
    return str(demo.folder)


def tpctl(folder: Path, *arguments: str, given: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpctl", "batch", *arguments, "--device", "cpu"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env},
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_openai_lines_by_the_demo_model_from_a_file_and_from_a_pipe(model: str, tmp_path: Path) -> None:
    hello = {"role": "user", "content": [{"type": "text", "text": "Name the capital of France."}]}
    chat = {"model": "gpt", "messages": [hello], "max_completion_tokens": 12, "logprobs": True, "n": 2}
    text = {"model": "gpt", "prompt": "The capital of Italy is", "max_tokens": 4}
    lines = [
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": text},
        {"custom_id": "tool", "method": "POST", "url": "/v1/chat/completions", "body": {**chat, "tools": [{}]}},
    ]
    prompts = write_lines(tmp_path / "in.jsonl", lines)
    run = tpctl(tmp_path, "in.jsonl", "-o", "out.jsonl", "--model", model, "--dtype", "float32")
    assert run.returncode == 1 and "1 error" in run.stderr and "Traceback" not in run.stderr
    rows = read_lines(tmp_path / "out.jsonl")
    found = ChatCompletion.model_validate(rows[0]["response"]["body"], strict=True)
    assert [choice.message.content for choice in found.choices] == ["The capital of France is Paris."] * 2
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content is not None
    assert "".join(token.token for token in found.choices[0].logprobs.content).startswith("The capital of France")
    assert Completion.model_validate(rows[1]["response"]["body"], strict=True).choices[0].text.startswith(" Rome.")
    assert rows[2]["response"]["status_code"] == 400

    piped = tpctl(tmp_path, "-", "--model", model, "--dtype", "float32", given=prompts.read_text())
    again = [json.loads(line) for line in piped.stdout.splitlines()]
    for row in (*rows, *again):
        row["response"]["body"].pop("created", None)
    assert piped.returncode == 1 and again == rows


def test_a_folder_of_parquet_over_two_replicas_goes_on_when_it_grows(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()

    def write(name: str, first: int, count: int) -> None:
        numbers = range(first, first + count)
        columns = {"q": [f"line {n}" for n in numbers], "key": [f"k{n}" for n in numbers], "raw": [b"x"] * count}
        pq.write_table(pa.table(columns), tmp_path / "in" / name, row_group_size=7)

    options = ["--prompt-column", "q", "--id-column", "key", "--keep-columns", "raw,q", "--model", model]
    options += ["--max-tokens", "4", "--max-model-len", "256", "--part-rows", "6", "--replicas", "2"]
    worker = {"TPCTL_WORKER": "tests.distributed.fast_worker"}
    write("a.parquet", 0, 20)
    run = tpctl(tmp_path, "in", "-o", "rows/", *options, **worker)
    assert run.returncode == 0, run.stderr
    first = (tmp_path / "rows" / "part-00000.parquet").stat().st_ino
    write("b.parquet", 20, 10)
    changed = tpctl(tmp_path, "in", "-o", "rows/", *options[:-8], "--model", model, "--resume", **worker)
    assert changed.returncode == 2 and "was made with" in changed.stderr
    run = tpctl(tmp_path, "in", "-o", "rows/", *options, "--resume", **worker)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "rows" / "part-00000.parquet").stat().st_ino == first
    rows = duckdb.sql(
        f"select id, raw, q, error from '{tmp_path}/rows/*.parquet' order by cast(id[2:] as int)"
    ).fetchall()
    assert rows == [(f"k{n}", b"x", f"line {n}", None) for n in range(30)]

    run = tpctl(tmp_path, "in", "-o", "whole.parquet", *options, **worker)
    assert run.returncode == 0, run.stderr
    whole = pq.read_table(tmp_path / "whole.parquet")
    assert whole["id"].to_pylist() == [f"k{n}" for n in range(30)] and not (tmp_path / "whole.parquet.parts").exists()
