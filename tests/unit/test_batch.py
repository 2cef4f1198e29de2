"""Batch: every line becomes one row, in order, whatever it holds and whenever the run is interrupted."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.unit.fake_client import FakeClient, engine_info, engine_stats, write_tokenizer
from tests.unit.fake_client import job_parser as parser
from tpctl.batch.formats.jsonl import JsonlReader, JsonlSource
from tpctl.cli import batch as cli_batch
from tpctl.cli import batch_report, places
from tpctl.cli.app import app
from tpctl.cli.console import note
from tpctl.cli.engine import say_context, say_policy
from tpctl.cli.options import SchedulingPolicy
from tpctl.cli.streams import NamedFile
from tpctl.client.batch import Batch, Tally
from tpctl.client.jobs import Line, read_lines
from tpctl.client.results import Results
from tpctl.client.resume import check_target, remains
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, OutputError, RequestError, UsageError
from tpctl.wire.messages import Output


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def run(
    tokenizer: Tokenizer,
    text: str,
    target: Path | None,
    *,
    resume: bool = False,
    window: int = 3,
    **client: Any,
) -> tuple[Tally, FakeClient]:
    fake = FakeClient(tokenizer, **client)
    with Results(target, {"model": "m"}, resume=resume) as results:
        tally = Batch(fake, tokenizer, results, window).run(  # type: ignore[arg-type]
            read_lines(io.BytesIO(text.encode())), parser(tokenizer)
        )
        results.publish(tally.lines)
    return tally, fake


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(count: int) -> str:
    return "".join(json.dumps({"prompt": "x" * (count - n)}) + "\n" for n in range(count))


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
    for asked, had in ((None, "fcfs"), ("fcfs", "fcfs"), ("makespan", "makespan")):
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
    assert rows(out)[1]["error"].startswith("line 2: is not JSON")
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


def test_answers_that_the_context_cuts_have_a_note(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fake = FakeClient(tokenizer, max_model_len=12)
    fake.context_full = "the KV cache holds 12 tokens"
    client: Any = fake
    lines = [{"prompt": "abcdefgh"}, {"prompt": "ab"}, {"prompt": "abcdefgh", "max_tokens": 2}]
    with Results(tmp_path / "out.jsonl", {}) as results:
        source = read_lines(io.BytesIO("\n".join(map(json.dumps, lines)).encode()))
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
        source = read_lines(io.BytesIO("\n".join(map(json.dumps, lines)).encode()))
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


def test_nothing_is_left_of_a_run_without_rows(tmp_path: Path) -> None:
    with Results(tmp_path / "out.jsonl", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    with (
        Results(tmp_path / "out.jsonl", {}),
        pytest.raises(OutputError, match="another tpctl batch is writing"),
    ):
        Results(tmp_path / "out.jsonl", {})


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder does not exist"):
        Results(tmp_path / "none" / "out.jsonl", {})
    with pytest.raises(OutputError, match="is a folder; name a file"):
        Results(tmp_path, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Results(tmp_path / "out.jsonl", {}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "kept"})
        with (
            Path("/dev/full").open("r+b", buffering=0) as full,
            monkeypatch.context() as patch,
            pytest.raises(OutputError, match=r"out\.jsonl\.partial: the disk is full; free some space$"),
        ):
            patch.setattr(results, "_file", full)
            results.add(Line(1, 2, b"b"), {"id": 2, "text": "x"})
        with (
            pytest.raises(
                OutputError, match=r"^full; 1 finished row is in .*out\.jsonl\.partial, go on with --resume$"
            ),
            remains(results, note),
        ):
            raise OutputError("full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_stream_that_takes_no_rows_is_one_line() -> None:
    with Results(None, {}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "lost"})
        said = r"^cannot write to /dev/full: No space left on device; name a file on a disk with -o, beside which"
        with pytest.raises(OutputError, match=said), places.writing():
            results.emit(NamedFile("/dev/full", "wb", "/dev/full"))
        with pytest.raises(BrokenPipeError), places.writing():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe", "standard output")


def test_an_interrupted_run_keeps_what_is_finished(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fake: Any = FakeClient(tokenizer)
    with Results(tmp_path / "out.jsonl", {}) as results:
        batch = Batch(fake, tokenizer, results, 3)
        lines = read_lines(io.BytesIO(prompts(9).encode()))
        tally = batch.run(lines, parser(tokenizer), should_stop=lambda: batch.tally.lines >= 4)
        assert tally.interrupted
        assert 4 <= results.count == tally.lines < 9
    # What was handed in and had not finished is aborted, and nothing else (the reader may not have got that far).
    assert len(fake.aborted) == len(fake.requests) - tally.lines
    assert tally.given_up == sorted(int(id) + 1 for id in fake.aborted)
    assert (tmp_path / "out.jsonl.partial").exists()


def test_answers_go_to_a_stream_in_order_as_they_come(tokenizer: Tokenizer) -> None:
    out = io.BytesIO()
    seen: list[int] = []

    def step(tally: Tally) -> None:
        results.emit(out)
        seen.append(out.getvalue().count(b"\n"))

    with Results(None, {}) as results:
        fake: Any = FakeClient(tokenizer)
        Batch(fake, tokenizer, results, 4).run(
            read_lines(io.BytesIO(prompts(6).encode())), parser(tokenizer), step=step
        )
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
        tally = Batch(fake, tokenizer, results, 4).run(read_lines(slow()), parser(tokenizer), step=step)
    assert tally.lines == 2
    assert time.monotonic() - started < 25


def test_an_input_that_breaks_is_heard_of(tokenizer: Tokenizer) -> None:
    def broken() -> Iterator[bytes]:
        yield b'{"prompt": "a"}'
        raise OSError("the disk went away")

    fake: Any = FakeClient(tokenizer)
    with Results(None, {}) as results, pytest.raises(OSError, match="went away"):
        Batch(fake, tokenizer, results, 4).run(read_lines(broken()), parser(tokenizer))


def tpctl(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_finished_answers_are_replaced_only_when_told(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    out.write_text('{"id": 1, "text": "dear"}\n')
    for more in ([], ["--resume"]):
        with pytest.raises(OutputError, match=r"out\.jsonl exists already; use --force to replace it"):
            check_target(out, resume=bool(more), force=False)
        result = tpctl("batch", str(prompts), "-o", str(out), *more)
        assert isinstance(result.exception, OutputError)
    assert "dear" in out.read_text()
    check_target(out, resume=False, force=True)
    out.with_name("out.jsonl.partial").write_text("rows of a run that was started with --force")
    check_target(out, resume=True, force=False)
    out.write_text("")  # as mktemp makes it
    check_target(out, resume=False, force=False)


def test_pipes_and_devices_are_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert places.target_of(str(pipe)) is None
    assert places.target_of("/dev/null") is None
    assert places.target_of("-") is None
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with places.output_stream(str(pipe), None) as out, Results(None, {}) as results:
        assert out is not None
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "x"})
        results.emit(out)
        assert json.loads(os.read(reader, 1000)) == {"id": 1, "text": "x"}
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(UsageError, match="--resume needs a file"):
        raise tpctl("batch", "nothing.jsonl", "-o", str(pipe), "--resume").exception


def test_a_link_and_the_files_mode_stay(tokenizer: Tokenizer, tmp_path: Path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.write_text("")
    real.chmod(0o600)
    link.symlink_to(real)
    target = places.target_of(str(link))
    run(tokenizer, '{"prompt": "a"}', target)
    assert link.is_symlink()
    assert rows(real)[0]["text"] == "<a>"
    assert real.stat().st_mode & 0o777 == 0o600
    with Results(target, {"model": "m"}) as results:
        assert results.partial is not None
        assert results.partial.stat().st_mode & 0o777 == 0o600


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


def test_a_stop_says_where_the_rows_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = r"1 finished row is in .*out\.jsonl\.partial, go on with --resume"
    with Results(tmp_path / "out.jsonl", {}) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "kept"})
        with pytest.raises(KeyboardInterrupt, match=kept), remains(results, note):
            raise KeyboardInterrupt
        with pytest.raises(SystemExit) as stopped, remains(results, note):
            raise SystemExit(143)
        assert stopped.value.code == 143
        assert re.fullmatch(f"tpctl: stopped; {kept}\n", capsys.readouterr().err)


def test_a_resumed_run_names_the_options_that_differ(tmp_path: Path) -> None:
    settings = {"model": "m", "sampling": {"temperature": 0.0, "seed": 0, "max_tokens": 9}}
    with Results(tmp_path / "out.jsonl", settings) as results:
        results.add(Line(0, 1, b"a"), {"id": 1, "text": "kept"})
    other = {"model": "m", "sampling": {"temperature": 0.0, "seed": 5, "max_tokens": 9, "top_p": 0.5}}
    with pytest.raises(UsageError, match=r"with --seed 0 \(now 5\), --top-p left out \(now 0\.5\); use"):
        Results(tmp_path / "out.jsonl", other, resume=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_could_not_be_written_is_not_said_again(tmp_path: Path) -> None:
    """A file that is closed tries once more what it still holds."""
    with (
        pytest.raises(OutputError, match=r"out\.jsonl\.partial: the disk is full; free some space$"),
        Results(tmp_path / "out.jsonl", {}) as results,
    ):
        results._file.close()
        results._file = io.BufferedRandom(io.FileIO("/dev/full", "r+"))
        results._file.seek = lambda *place: 0  # type: ignore[method-assign]
        results.add(Line(1, 2, b"b"), {"id": 2, "text": "x"})


@pytest.mark.parametrize(("output", "said"), [("", "-o is empty"), ("/", "lies in /, where the rows go")])
def test_outputs_without_a_name(output: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    error = CliRunner().invoke(app, ["batch", str(tmp_path / "in.jsonl"), "-o", output]).exception
    assert isinstance(error, UsageError | OutputError)
    assert said in str(error)
