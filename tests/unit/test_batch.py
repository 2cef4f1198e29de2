"""Batch: every line becomes one row, in order, whatever it holds and whenever the run is interrupted."""

from __future__ import annotations

import errno
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_runs import numbered, prompts, rows, run
from tests.unit.fake_client import FakeClient, engine_info, engine_stats, write_tokenizer
from tests.unit.fake_client import job_parser as parser
from tpctl.cli import batch_report
from tpctl.cli.engine import say_context, say_policy
from tpctl.cli.options import SchedulingPolicy
from tpctl.client.batch import Batch, Tally
from tpctl.client.results import Results
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError
from tpctl.wire.messages import Output


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_line_that_a_library_stumbles_over_is_an_error_row(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokenizer.encode

    def stumble(text: str, *, most: int | None = None) -> list[int]:
        if text == "b":
            raise KeyError("deep\ninside")
        if text == "d":
            raise RequestError("no \x1b[31mred")
        return encode(text, most=most)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", stumble)
        tally, _ = run(tokenizer, "".join(f'{{"prompt": "{word}"}}\n' for word in "abcd"), tmp_path / "out.jsonl")
    assert tally.errors == 2
    found = rows(tmp_path / "out.jsonl")
    assert [row.get("text") for row in found] == ["<a>", None, "<c>", None]
    assert found[1]["error"] == "line 2: cannot be used: KeyError: 'deep\\ninside'"
    assert found[3]["error"] == r"line 4: no \x1b[31mred"


def test_where_stderr_is_no_terminal_a_line_at_times_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tally = Tally(lines=12_000, errors=3, completion_tokens=120_000, started=1000.0)
    with batch_report.progress(50_000, 1, silent=False) as show:
        for now[0] in (1001.0, 1059.0, 1060.0, 1061.0, 1119.0, 1121.0):
            show(tally)
    assert capsys.readouterr().err == (
        "12,000 of 50,000 lines after 60 s, 2,000 tok/s, 3 errors\n"
        "12,000 of 50,000 lines after 121 s, 992 tok/s, 3 errors\n"
    )
    now[0] = 2000.0
    with batch_report.progress(None, 1, silent=False) as show:
        now[0] = 2060.0
        show(Tally(lines=1, started=2050.0))
    assert capsys.readouterr().err == "1 line after 10 s, 0 tok/s\n"


def test_a_line_that_cannot_be_written_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    class Full:
        def write(self, text: str) -> None:
            tries.append(text)
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(batch_report, "REPORTS", 0.0)
    report = batch_report._reports(None)
    report(Tally(lines=1))
    report(Tally(lines=2))
    assert [text.split()[0] for text in tries] == ["1", "2"]


def test_a_policy_that_cannot_be_had_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, had in ((None, "fcfs"), ("fcfs", "fcfs"), ("makespan", "makespan"), ("auto", "fcfs")):
        say_policy(asked and SchedulingPolicy(asked), engine_info(scheduling_policy=had))
    assert capsys.readouterr().err == ""
    say_policy(SchedulingPolicy.makespan, engine_info(scheduling_policy="fcfs"))
    said = capsys.readouterr().err
    assert said.startswith("--scheduling-policy makespan needs a GPU") and said.endswith("fcfs it is\n")


def test_an_interrupted_run_claims_no_preemptions() -> None:
    assert "preemptions" not in batch_report.summary(Tally(lines=1), None)
    assert "3 preemptions" in batch_report.summary(Tally(lines=1), engine_stats(preemptions=3))


def test_rows_come_in_the_order_of_the_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    tally, client = run(tokenizer, prompts(9), out)
    assert [row["text"] for row in rows(out)] == [f"<{'x' * (9 - n)}>" for n in range(9)]
    assert rows(out)[0] == {
        "id": 1,
        "text": "<xxxxxxxxx>",
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "completion_tokens": 12,
    }
    assert (tally.lines, tally.errors, tally.cached_tokens, tally.prompt_tokens) == (9, 0, 9, 45)
    assert client.most_open == 3
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_bad_lines_become_rows_and_the_others_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    text = '{"prompt": "a"}\nnonsense\n\n{"id": "r", "prompt": "refuse"}\n{"prompt": "b"}\n'
    tally, _ = run(tokenizer, text, out)
    assert [row.get("text") for row in rows(out)] == ["<a>", None, None, "<b>"]
    assert rows(out)[1]["error"].startswith("line 2 is not JSON: ")
    assert rows(out)[2] == {"id": "r", "error": "line 4: the engine refuses"}
    assert (tally.lines, tally.errors) == (4, 2)


def test_stop_strings_and_lengths_and_logprobs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    lines = [{"prompt": "abcdef", "stop": ["cd"]}, {"prompt": "abc", "max_tokens": 2, "logprobs": 1}]
    _, client = run(tokenizer, "\n".join(map(json.dumps, lines)), out)
    first, second = rows(out)
    assert (first["text"], first["finish_reason"], first["completion_tokens"]) == ("<ab", "stop", 5)
    assert client.aborted == ["0"]
    assert (second["text"], second["finish_reason"], second["completion_tokens"]) == ("<a", "length", 2)
    assert [entry["token"] for entry in second["logprobs"]] == ["<", "a"]
    assert second["logprobs"][0]["top"][0]["logprob"] == -0.5


def test_a_row_that_json_has_no_form_for_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    tally, _ = run(tokenizer, '{"prompt": "a"}\n{"prompt": "nan", "logprobs": 0}\n', out)
    assert (tally.lines, tally.errors) == (2, 1)
    first, second = rows(out)
    assert first["text"] == "<a>"
    assert second == {
        "id": 2,
        "error": "line 2: the answer's numbers are not finite (NaN or infinity), which JSON has no form for",
    }


def test_answers_that_the_context_cuts_have_a_note(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fake = FakeClient(tokenizer, max_model_len=12)
    fake.context_full = "the KV cache holds 12 tokens"
    client: Any = fake
    lines = [{"prompt": "abcdefgh"}, {"prompt": "ab"}, {"prompt": "abcdefgh", "max_tokens": 2}]
    with Results(tmp_path / "out.jsonl", {}) as results:
        source = numbered(io.BytesIO("\n".join(map(json.dumps, lines)).encode()))
        tally = Batch(client, tokenizer, results, 3).run(source, parser(tokenizer))
        results.publish(3)
    found = [(row["text"], row["finish_reason"], row.get("note")) for row in rows(tmp_path / "out.jsonl")]
    assert found == [("<abc", "length", fake.context_full), ("<ab>", "stop", None), ("<a", "length", None)]
    assert "1 answer cut by the end of the context" in batch_report.summary(tally, None)


def test_a_context_that_the_kv_cache_shortens_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    info = engine_info(kv_cache_bytes=1_500_000)
    say_context(info)
    assert capsys.readouterr().err == ""
    say_context(replace(info, wanted_model_len=8192))
    assert " ".join(capsys.readouterr().err.split()) == (
        "the KV cache of 1.5 MB a rank holds 64 tokens, fewer than the model's 8,192: prompt and answer together are "
        "limited to 64; raise --kv-cache-memory if that is too few"
    )


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    def read(text: str, stop: list[str], min_tokens: int) -> tuple[str, bool]:
        stream = TextStream(tokenizer, stop, min_tokens=min_tokens)
        outputs = [*(Output("a", [id]) for id in tokenizer.encode(text)), Output("a", [], "length")]
        shown = [segment.text for output in outputs for segment in stream.push(output)]
        return "".join(shown), stream.stopped_early

    for min_tokens, want in ((0, "a"), (2, "a"), (3, "abcda"), (6, "abcda"), (7, "abcdabcd")):
        assert read("abcdabcd", ["bc"], min_tokens) == (want, min_tokens < 7)
    assert read("aaa", ["aa"], 2) == ("a", True)  # it may begin before


def test_answers_go_to_a_stream_in_order_as_they_come(tokenizer: Tokenizer) -> None:
    out = io.BytesIO()
    seen: list[int] = []

    def step(tally: Tally) -> None:
        results.emit(out)
        seen.append(out.getvalue().count(b"\n"))

    with Results(None, {}) as results:
        fake: Any = FakeClient(tokenizer)
        Batch(fake, tokenizer, results, 4).run(numbered(io.BytesIO(prompts(6).encode())), parser(tokenizer), step=step)
    assert [json.loads(line)["id"] for line in out.getvalue().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_a_slow_input_does_not_hold_up_answers(tokenizer: Tokenizer) -> None:
    answered: list[int] = []

    def slow() -> Iterator[bytes]:
        yield b'{"prompt": "a"}'
        deadline = time.monotonic() + 30
        while not answered and time.monotonic() < deadline:
            time.sleep(0.01)
        yield b'{"prompt": "b"}'

    def step(tally: Tally) -> None:
        if tally.lines == 1:
            answered.append(1)

    with Results(None, {}) as results:
        fake: Any = FakeClient(tokenizer)
        started = time.monotonic()
        tally = Batch(fake, tokenizer, results, 4).run(numbered(slow()), parser(tokenizer), step=step)
    assert tally.lines == 2
    assert time.monotonic() - started < 25


def test_an_input_that_breaks_is_heard_of(tokenizer: Tokenizer) -> None:
    def broken() -> Iterator[bytes]:
        yield b'{"prompt": "a"}'
        raise OSError("the disk went away")

    fake: Any = FakeClient(tokenizer)
    with Results(None, {}) as results, pytest.raises(OSError, match="went away"):
        Batch(fake, tokenizer, results, 4).run(numbered(broken()), parser(tokenizer))
