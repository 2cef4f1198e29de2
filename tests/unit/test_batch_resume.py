"""Batch: what an interrupted run leaves, and how it goes on."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.batch_runs import numbered, prompts, rows, run
from tests.unit.fake_client import FakeClient, write_tokenizer
from tests.unit.fake_client import job_parser as parser
from tpctl.batch.formats.jsonl import JsonlReader, JsonlSource
from tpctl.cli import batch as cli_batch
from tpctl.client.batch import Batch
from tpctl.client.jobs import Line
from tpctl.client.results import Results
from tpctl.client.resume import remains, rows_left
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, OutputError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_rows_of_an_earlier_version_that_json_has_no_form_for_are_made_anew(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    lines = [b'{"prompt": "a"}', b'{"prompt": "NaN"}']
    with Results(out, {"model": "m"}) as results:
        for index, line in enumerate(lines):
            results.add(Line(index, index + 1, line), {"id": index + 1, "text": "NaN", "logprobs": 7})
        partial = results.partial
    assert partial is not None
    partial.write_text(partial.read_text().replace("7}", "NaN}", 1))
    tally, _ = run(tokenizer, "\n".join(line.decode() for line in lines), out, resume=True)
    assert tally.resumed == 1
    assert [row["text"] for row in rows(out)] == ["<a>", "NaN"]


def test_an_engine_that_dies_leaves_rows_to_go_on_with(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(EngineError):
        run(tokenizer, prompts(9), out, dies_after=18)
    partial = tmp_path / "out.jsonl.partial"
    finished = len(partial.read_text().splitlines()) - 1
    assert 0 < finished < 9
    assert not out.exists()
    with pytest.raises(OutputError, match=r"out\.jsonl\.partial holds the rows.*--resume"):
        run(tokenizer, prompts(9), out)
    tally, client = run(tokenizer, prompts(9), out, resume=True)
    assert (tally.lines, tally.resumed, len(client.requests)) == (9, finished, 9 - finished)
    assert [row["text"] for row in rows(out)] == [f"<{'x' * (9 - n)}>" for n in range(9)]
    assert not partial.exists()


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 900), edited=st.sets(st.integers(0, 5)))
def test_resume_from_a_file_cut_anywhere_with_lines_edited(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, cut: int, edited: set[int]
) -> None:
    out = tmp_path_factory.mktemp("run") / "out.jsonl"
    lines = [{"prompt": f"line {n}"} for n in range(6)]
    with Results(out, {"model": "m"}) as results:
        fake: Any = FakeClient(tokenizer)
        source = numbered(io.BytesIO("\n".join(map(json.dumps, lines)).encode()))
        Batch(fake, tokenizer, results, 2).run(source, parser(tokenizer))
        assert results.partial is not None
        partial = results.partial
    os.truncate(partial, min(cut, partial.stat().st_size))
    for n in edited:
        lines[n]["prompt"] = f"other {n}"
    tally, client = run(tokenizer, "\n".join(map(json.dumps, lines)), out, resume=True)
    assert [row["text"] for row in rows(out)] == [f"<{line['prompt']}>" for line in lines]
    assert len(client.requests) == 6 - tally.resumed >= len(edited)


def test_error_rows_are_tried_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out, {"model": "m"}) as results:
        results.add(Line(0, 1, b'{"prompt": "a"}'), {"id": 1, "error": "passing"})
    tally, _ = run(tokenizer, '{"prompt": "a"}', out, resume=True)
    assert (tally.resumed, rows(out)[0]["text"]) == (0, "<a>")


def test_resume_under_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out, {"model": "m", "sampling": {"temperature": 0.0}}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "x"})
    with pytest.raises(UsageError, match=r"made with model m, but now it is n"):
        Results(out, {"model": "n", "sampling": {"temperature": 0.0}}, resume=True)


def test_an_interrupted_run_keeps_what_is_finished(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fake: Any = FakeClient(tokenizer)
    with Results(tmp_path / "out.jsonl", {}) as results:
        batch = Batch(fake, tokenizer, results, 3)
        lines = numbered(io.BytesIO(prompts(9).encode()))
        tally = batch.run(lines, parser(tokenizer), should_stop=lambda: batch.tally.lines >= 4)
        assert tally.interrupted
        assert 4 <= results.count == tally.lines < 9
    # What was handed in and had not finished is aborted, and nothing else (the reader may not have got that far).
    assert len(fake.aborted) == len(fake.requests) - tally.lines
    assert tally.given_up == sorted(int(id) + 1 for id in fake.aborted)
    assert (tmp_path / "out.jsonl.partial").exists()


def reader(name: str, lines: bytes) -> JsonlReader:
    return JsonlReader(io.BytesIO(lines), JsonlSource(Path(name)))


def test_rows_of_another_input_are_not_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out, {}) as results:
        for index in range(3):
            results.add(Line(index, index + 1, b"line %d" % index), {"id": index, "text": "x"})
    with Results(out, {}, resume=True) as results:
        cli_batch._check_kept(reader("same.jsonl", b"line 0\nline 1\nline 2\nline 3\n"), results)
        assert not capsys.readouterr().err
        shorter = reader("shorter.jsonl", b"line 0\nother\n")
        cli_batch._check_kept(shorter, results)
        assert "2 of the 3 rows" in capsys.readouterr().err
        assert [line.raw for line in shorter.lines()] == [b"line 0\n", b"other\n"]
        with pytest.raises(UsageError, match=r"none of the 3 rows in .*partial answers a line of new\.jsonl"):
            cli_batch._check_kept(reader("new.jsonl", b"a\nb\n"), results)
    assert out.with_name("out.jsonl.partial").exists()


def test_a_stop_says_where_the_rows_are(tmp_path: Path) -> None:
    kept = r"1 finished row is in .*out\.jsonl\.partial, go on with --resume"
    with Results(tmp_path / "out.jsonl", {}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "kept"})
        with pytest.raises(KeyboardInterrupt, match=kept), remains(lambda: rows_left(results)):
            raise KeyboardInterrupt
        with pytest.raises(SystemExit) as stopped, remains(lambda: rows_left(results)):
            raise SystemExit(143)
        assert stopped.value.code == 143
        assert re.fullmatch(kept, *stopped.value.__notes__)


def test_a_resumed_run_names_the_options_that_differ(tmp_path: Path) -> None:
    settings = {"model": "m", "sampling": {"temperature": 0.0, "seed": 0, "max_tokens": 9}}
    with Results(tmp_path / "out.jsonl", settings) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "kept"})
    other = {"model": "m", "sampling": {"temperature": 0.0, "seed": 5, "max_tokens": 9, "top_p": 0.5}}
    with pytest.raises(UsageError, match=r"with --seed 0 \(now 5\), --top-p left out \(now 0\.5\); use"):
        Results(tmp_path / "out.jsonl", other, resume=True)
