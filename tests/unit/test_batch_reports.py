"""What is said of a batch over parts: while it runs, at its end, and to who asks."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.batch_replicas import Replicas, finish, parts_of, write_prompts
from tpctl.batch import signs, status
from tpctl.batch.coordinator import Coordinator, Progress
from tpctl.batch.folder import JobFolder, load, put
from tpctl.batch.formats.choose import plain
from tpctl.batch.local import Local
from tpctl.batch.manifest import begun, check_settings, stats_of, write_manifest
from tpctl.batch.plan import Division, Plan
from tpctl.batch.signs import lock
from tpctl.batch.status import read_status
from tpctl.cli import batch_report
from tpctl.cli.app import app
from tpctl.cli.batch_job import JobOptions, is_job
from tpctl.cli.batch_report import job_progress, job_summary
from tpctl.errors import OutputError, SourceError, UsageError

PROGRESS = Progress(
    rows=1200,
    total=5000,
    whole=False,
    errors=2,
    prompt_speed=1500.4,
    speed=300.6,
    alive=3,
    wanted=4,
    seconds=60.0,
    left=190.0,
)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "out")


def done(folder: JobFolder, tmp_path: Path) -> Path:
    prompts = write_prompts(tmp_path, 25)
    finish(folder, prompts, parts_of(folder, prompts, 10), Replicas(folder, prompts))
    return prompts


def run(folder: JobFolder, prompts: Path, **how: Any) -> Coordinator:
    """One run without replicas, of a batch that is done."""
    with Coordinator(
        folder, Plan(folder, plain(prompts), Division(10)), Local(folder.root, [], ""), **how
    ) as coordinator:
        assert coordinator.run(lambda progress: None, lambda: False)
    return coordinator


def test_progress_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with job_progress(4, 1) as show:
        for now[0] in (1001.0, 1060.0, 1061.0):
            show(PROGRESS)
        now[0] = 1130.0
        show(replace(PROGRESS, whole=True, left=None, errors=0))
    assert capsys.readouterr().err == (
        "1,200 of about 5,000 rows after 1 min 00 s, 1,500 tok/s in, 301 out, 3 of 4 replicas, 2 errors, "
        "3 min 10 s left\n"
        "1,200 of 5,000 rows after 1 min 00 s, 1,500 tok/s in, 301 out, 3 of 4 replicas\n"
    )


def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=150)
    monkeypatch.setattr(batch_report.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(batch_report, "stderr", lambda: console)
    with job_progress(4, 2) as show:
        show(PROGRESS)
    shown = file.getvalue()
    assert "4 replicas, tp 2" in shown and "1200/5000" in shown
    assert "1,500 tok/s in, 301 out, 3 of 4 replicas, 2 errors" in shown and "3 min 10 s left" in shown


def test_the_end_in_one_line(folder: JobFolder, tmp_path: Path) -> None:
    coordinator = run(folder, done(folder, tmp_path))
    coordinator.board.sums.cached_tokens = 5
    totals = {**coordinator.totals(), "seconds": 10.0, "gpu_seconds": 7200.0}
    stats = stats_of(coordinator.board, totals, price=2.5)
    assert (stats["rows"], stats["gpu_hours"], stats["cost"], stats["tokens_per_second"]) == (25, 2.0, 5.0, 2.5)
    assert "cost" not in stats_of(coordinator.board, totals, price=None)
    assert job_summary(stats, 25) == (
        "25 rows in 10.0 s, 50 tokens in, 25 out (2.5 tok/s), prefix cache 5 tokens (10%), 2 GPU hours, cost 5.00, "
        "0 errors"
    )


def test_what_it_took_is_summed_over_runs(folder: JobFolder, tmp_path: Path) -> None:
    prompts = done(folder, tmp_path)
    first = run(folder, prompts).totals()["seconds"]
    assert 0 < first < run(folder, prompts).totals()["seconds"]
    state = load(folder.state)
    assert state is not None and state["generation"] == 2 and state["state"] == "done"


def test_status_of_one_that_is_done_runs_or_was_killed(
    folder: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match="there is no batch at"):
        read_status(folder.root)
    run(folder, done(folder, tmp_path))
    found = read_status(folder.root)
    assert (found.state, found.rows, found.total, found.parts, found.completion_tokens) == ("done", 25, 25, 3, 25)
    state = load(folder.state)
    assert state is not None
    put(folder.state, {**state, "state": "running", "rows": 17, "left": 60.0, "wanted": 2})
    put(folder.replicas / "r.json", {"state": "working", "host": "h", "rows": 4})
    assert read_status(folder.root).state == "killed"
    held = lock(folder.lock)
    assert held is not None
    found = read_status(folder.root)
    assert (found.state, found.rows, found.left) == ("running", 17, 60.0)
    assert found.replicas == [{"name": "r", "host": "h", "state": "working", "rows": 4}]
    text = CliRunner().invoke(app, ["batch", "status", str(folder.root)]).stdout.splitlines()
    assert text[0] == "running" and text[1] == "17 of 25 rows (68%), 0 errors, 3 parts done"
    assert text[4] == "0 tok/s in, 0 out, 1 of 2 replicas at work" and text[5] == "  r on h: working, 4 rows"
    assert text[6].startswith("ends about 2") and text[6].endswith("in 1 min 00 s")
    held.close()
    put(folder.state, {**state, "state": "failed", "reason": "no room"})
    assert CliRunner().invoke(app, ["batch", "status", str(folder.root)]).stdout.startswith("failed: no room\n")
    # Of one on another machine only its count tells.
    monkeypatch.setattr(status, "_SIGN", 0.2)
    monkeypatch.setattr(signs, "machine", lambda: "this")
    put(folder.state, {**state, "state": "running", "machine": "another", "count": 5})
    assert read_status(folder.root).state == "killed"


def test_rows_that_a_replicas_last_sign_counts_are_not_counted_twice(folder: JobFolder, tmp_path: Path) -> None:
    prompts = done(folder, tmp_path)
    folder.replicas.mkdir(parents=True, exist_ok=True)
    with lock(folder.replicas / "r.lock"):  # type: ignore[union-attr]
        sign = {"count": 1, "machine": signs.machine(), "state": "working", "rows": 25, "open_rows": 9}
        put(folder.replicas / "r.json", {**sign, "prompt_tokens": 0, "completion_tokens": 0})
        run(folder, prompts)
    found = read_status(folder.root)
    assert (found.state, found.rows, found.total) == ("done", 25, 25)


def test_a_replica_by_hand_says_why_there_is_nothing_to_do(folder: JobFolder, tmp_path: Path) -> None:
    from tpctl.batch.replica import ended

    run(folder, done(folder, tmp_path))
    assert ended(folder) == "done"
    state = load(folder.state)
    assert state is not None
    put(folder.state, {**state, "state": "interrupted"})
    assert ended(folder) == "interrupted"
    put(folder.state, {**state, "state": "running", "count": 9})
    assert ended(folder) == "killed"
    held = lock(folder.lock)
    assert held is not None and ended(folder) is None
    held.close()
    put(folder.state, {**state, "state": "running", "count": 9, "machine": "another"})
    assert ended(folder) is None  # its count may move yet


def test_status_as_json_and_by_the_name_of_the_file(folder: JobFolder, tmp_path: Path) -> None:
    run(folder, done(folder, tmp_path))
    folder.root.rename(tmp_path / "rows.jsonl.parts")
    said = CliRunner().invoke(app, ["batch", "status", "--json", str(tmp_path / "rows.jsonl")])
    assert json.loads(said.stdout)["rows"] == 25
    for name, text in (("a.jsonl.partial", "one engine writes .*a.jsonl, .* are in .*a.jsonl.partial"), ("b", "whole")):
        (tmp_path / name).touch()
        with pytest.raises(SourceError, match=text):
            read_status(tmp_path / name.removesuffix(".partial"))


def test_which_batches_run_over_parts(tmp_path: Path) -> None:
    assert is_job(str(tmp_path), JobOptions()) and is_job("new/", JobOptions())
    assert not is_job("rows.jsonl", JobOptions()) and not is_job("-", JobOptions(replicas="1"))
    assert is_job("rows.jsonl", JobOptions(replicas="auto")) and is_job("rows.jsonl", JobOptions(replicas="2"))
    for options, said in (
        (JobOptions(replicas="²"), "must be a whole number"),
        (JobOptions(replicas="2000"), "must be a whole number"),
        (JobOptions(gpu_hour_price=1.0), "--gpu-hour-price needs a folder"),
        (JobOptions(retry_errors=True), "--retry-errors needs a folder"),
        (JobOptions(step_timeout=5.0), "--step-timeout needs a folder"),
    ):
        with pytest.raises(UsageError, match=said):
            is_job("rows.jsonl", options)
    with pytest.raises(UsageError, match="--replicas auto needs a file or a folder"):
        is_job("-", JobOptions(replicas="auto"))


def test_settings_that_differ_are_named(folder: JobFolder, tmp_path: Path) -> None:
    prompts = done(folder, tmp_path)
    settings = {"model": "m", "sampling": {"max_tokens": 8}, "model_digest": "abc"}
    write_manifest(folder, settings, Plan(folder, plain(prompts), Division(10)))
    assert begun(folder, resume=True, force=False)
    assert check_settings(folder, settings) == check_settings(folder, {"model": "m"}) == Division(10)
    for changed, said in (
        ({"model": "n"}, "was made with model m, but now it is n;"),
        ({"sampling": {"max_tokens": 9}}, r"was made with --max-tokens 8 \(now 9\);"),
        ({"formats": {"keep_columns": ["a", "b"]}}, r"was made with --keep-columns left out \(now a,b\);"),
        ({"sampling": {}}, r"was made with --max-tokens 8 \(now left out\);"),
        ({"model_digest": "abd"}, "was made with model_digest abc, but now it is abd;"),
    ):
        with pytest.raises(UsageError, match=said):
            check_settings(folder, {**settings, **changed})
    with pytest.raises(OutputError, match="holds a batch; go on with --resume"):
        begun(folder, resume=False, force=False)
    folder.manifest.write_text("{")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"manifest\.json cannot be read, and there are parts; bring it back"):
            begun(folder, resume=resume, force=False)
    assert len(folder.parts()) == 3
    put(folder.manifest, {"tpctl_batch": 99})
    with pytest.raises(OutputError, match="not written by this version"):
        begun(folder, resume=True, force=False)
    (folder.kept / "00000.x").touch()
    assert not begun(folder, resume=False, force=True) and not list(folder.kept.iterdir())
    (folder.kept / "00000.x").touch()
    assert not begun(folder, resume=True, force=False) and not list(folder.kept.iterdir())
    assert not folder.parts() and not folder.manifest.exists() and folder.offers.is_dir()


def test_a_replica_of_a_host_that_was_lost_is_not_at_work(folder: JobFolder, tmp_path: Path) -> None:
    """Its file stays as it was, since nobody can tell whether it will come back."""
    prompts = done(folder, tmp_path)
    said = {"state": "working", "host": "h", "rows": 4, "machine": "another", "count": 9, "life": "a"}
    put(folder.replicas / "gone.json", said)
    held = lock(folder.lock)
    plan, seconds = Plan(folder, plain(prompts), Division(10)), itertools.count()
    with Coordinator(folder, plan, Local(folder.root, [], ""), clock=lambda: next(seconds)) as coordinator:
        for state in ("working", "silent"):
            coordinator._tick()
            coordinator._signs.write()
            assert [one["state"] for one in read_status(folder.root).replicas] == [state]
            for _ in range(int(signs.PATIENCE) + 1):
                coordinator._tick()
    assert held is not None
