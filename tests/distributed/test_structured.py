"""Answers of a given form by the demo model, as users ask for them: from Python, in ``batch`` and in ``chat``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion

from tests.distributed.schema_suite import ask, wrong
from tests.schemas import all_schemas
from tests.schemas_parts import SHORT, SMALL, closed, listed
from tests.unit.batch_formats_run import read_lines, write_lines
from tpctl import LLM, SamplingParams
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.wire.guide import of_schema

pytestmark = pytest.mark.slow
PATIENCE = 300.0
PERSON = closed({"name": SHORT, "age": SMALL})


def tpctl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpctl", *arguments, "--device", "cpu", "--max-model-len", "512"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.daily(2)
@pytest.mark.parametrize(("tp", "start"), [(1, 0), (2, 5)])
def test_a_sample_of_schemas(demo: ResolvedSource, tp: int, start: int) -> None:
    """All of them: ``python -m tests.distributed.schema_suite``."""
    schemas = all_schemas()
    assert len({name for name, _ in schemas}) == len(schemas) >= 200
    some = schemas[start::36]
    with LLM(demo.folder, tp=tp, device="cpu", max_model_len=1024, kv_cache_memory=256 << 20) as llm:
        answers = ask(llm, some, 1.0, 96)
        assert wrong(some, answers) == []
        assert sum(answer.finish_reason == "stop" for answer in answers) > len(some) // 2
        (answer,) = llm.generate("Phone: ", SamplingParams(temperature=1.0, regex=r"\d{3}-\d{4}"))
        assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", answer.text) and answer.finish_reason == "stop"
        question = [{"role": "user", "content": "Is the sea blue?"}]
        assert llm.chat(question, SamplingParams(choice=("yes", "no"))).text in ("yes", "no")


def test_lines_of_a_batch(small: str, tmp_path: Path) -> None:
    """A schema for all lines, and lines that have forms of their own."""
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    lines = [
        {"prompt": "A person as JSON:", "prompt_logprobs": 1, "logprobs": 1},
        {"prompt": "Colour: ", "choice": ["red", "blue"]},
        {"prompt": "Numbers: ", "response_format": of_schema(listed(SMALL, 2, 2))},
        {"prompt": "Wrong", "regex": "(["},
        {"prompt": "Endless", "grammar": 'start: "a" start'},
        {"messages": [{"role": "user", "content": "A person, please."}], "temperature": 1.0},
    ]
    write_lines(tmp_path / "in.jsonl", lines)
    options = ["--model", small, "--max-tokens", "120", "--dtype", "float32"]
    run = tpctl(tmp_path, "batch", "in.jsonl", "-o", "out.jsonl", "--json-schema", "person.json", *options)
    assert run.returncode == 1 and "2 errors" in run.stderr and "Traceback" not in run.stderr, run.stderr
    rows = read_lines(tmp_path / "out.jsonl")
    validator = Draft202012Validator(PERSON)
    assert all(validator.is_valid(json.loads(rows[at]["text"])) for at in (0, 5))
    assert rows[1]["text"] in ("red", "blue") and len(json.loads(rows[2]["text"])) == 2
    assert rows[3]["error"].startswith("line 4: regex: at 1(8): invalid regex")
    assert rows[4]["error"].startswith("line 5: grammar: the grammar takes more than its limits allow")
    told = rows[0]["prompt_logprobs"]
    assert "".join(one["token"] for one in told) == lines[0]["prompt"] and told[0]["logprob"] is None
    assert all(one["logprob"] <= one["top"][0]["logprob"] <= 0 for one in told[1:])


def test_openai_lines(small: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Describe a person as JSON."}]
    body = {"model": "x", "messages": messages, "max_tokens": 120}
    forms = [
        of_schema(PERSON),
        {"type": "json_object"},
        {"type": "text"},
        of_schema({"type": "objekt"}),
        {"type": "json_schema", "json_schema": {"name": "x"}},
    ]
    lines = [
        {
            "custom_id": str(at),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "response_format": form},
        }
        for at, form in enumerate(forms)
    ]
    write_lines(tmp_path / "in.jsonl", lines)
    run = tpctl(tmp_path, "batch", "in.jsonl", "-o", "out.jsonl", "--model", small)
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["response"]["status_code"] for row in rows] == [200, 200, 200, 400, 400], run.stderr
    found = [ChatCompletion.model_validate(row["response"]["body"], strict=True).choices[0] for row in rows[:2]]
    assert Draft202012Validator(PERSON).is_valid(json.loads(found[0].message.content or ""))
    if found[1].finish_reason == "stop":
        assert isinstance(json.loads(found[1].message.content or ""), dict)
    assert rows[3]["response"]["body"]["error"]["message"] == "line 4: response_format: Invalid type: objekt"


def test_a_chat(small: str, tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    run = tpctl(tmp_path, "chat", small, "-m", "Describe a person.", "--json-schema", "person.json")
    assert run.returncode == 0, run.stderr
    assert Draft202012Validator(PERSON).is_valid(json.loads(run.stdout))
