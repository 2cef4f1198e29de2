"""``tpctl batch`` over parts as a user runs it: several replicas, each with ranks of its own, and an engine that has no
model (``fast_worker.py``); where it says so, the real one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import batch_kills
from tests.distributed.batch_jobs import OPTIONS, PATIENCE, Make, parts, said, wait_until
from tests.distributed.batch_jobs import batch as batch
from tests.distributed.batch_jobs import model as model
from tpctl.batch.folder import load, names

pytestmark = pytest.mark.slow


def test_a_folder_of_parts_and_one_file_and_one_engine_say_the_same(batch: Make, tmp_path: Path) -> None:
    run = batch(300)
    assert run("--replicas", "2").returncode == 0
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(300)]
    assert len(run.folder.parts()) == 8
    stats, manifest = load(run.folder.stats), load(run.folder.manifest)
    assert stats is not None and manifest is not None
    assert (stats["rows"], stats["errors"], stats["gpu_hours"]) == (300, 0, 0.0)
    assert stats["completion_tokens"] == sum(row["completion_tokens"] for row in run.rows())
    assert manifest["input"]["rows"] == 300 and manifest["settings"]["sampling"]["max_tokens"] == 8
    status = run.status()
    assert (status["state"], status["rows"], status["total"], status["parts"]) == ("done", 300, 300, 8)

    file = tmp_path / "rows.jsonl"
    command = [*run.command[:5], "-o", str(file), *run.command[7:], *OPTIONS, "--replicas", "3"]
    subprocess.run(command, env=run.env, check=True, timeout=PATIENCE)
    assert [json.loads(line) for line in file.open()] == run.rows()
    assert not file.with_name("rows.jsonl.parts").exists()
    assert not run.left()


def test_what_goes_on_and_what_is_refused(batch: Make) -> None:
    run = batch(40)
    assert run("--part-rows", "16").returncode == 0
    assert "out holds a batch; go on with --resume" in said(run())
    assert "was made with --max-tokens 8 (now 9); use the same" in said(run("--resume", "--max-tokens", "9"))
    assert "have 16 rows; leave it out" in said(run("--resume", "--part-rows", "5"))
    first = run.folder.part(0).stat().st_ino
    with run.prompts.open("a") as file:
        file.write('{"id": "row-7", "prompt": "again"}\n{"id": "new", "prompt": "new"}\nno json\n')
    grown = run("--resume")
    assert grown.returncode == 1 and "1 line with an id that an earlier line has" in grown.stderr
    assert run.folder.part(0).stat().st_ino == first
    assert [row["id"] for row in run.rows()[40:]] == ["row-7", "new", 43]
    assert "id 'row-7' was used before" in run.rows()[40]["error"] and "is not JSON" in run.rows()[42]["error"]
    text = run.prompts.read_text()
    run.prompts.write_text(text.replace("5 and", "5 und"))
    assert "lines 1 to 16 of" in said(run("--resume"))
    run.prompts.write_text(text)
    assert run("--force", "--part-rows", "40").returncode == 1
    assert [part.rows for part in parts(run)] == [40, 3]


@pytest.mark.parametrize(("what", "options"), [("DEADLY", ("--replicas", "2")), ("HANGS", ("--step-timeout", "2"))])
def test_a_line_that_kills_or_hangs_engines_is_found_and_the_others_are_answered(
    batch: Make, what: str, options: tuple[str, ...]
) -> None:
    from tpctl.client.tokenizer import Tokenizer

    run = batch(60)
    model = Path(run.command[-1])
    ids = Tokenizer(model).encode("a poisonous prompt")
    run.env[f"FAST_WORKER_{what}"] = ",".join(map(str, ids))
    lines = run.prompts.read_text().splitlines()
    lines[33] = json.dumps({"id": "row-33", "prompt": "a poisonous prompt"})
    run.prompts.write_text("\n".join(lines))
    result = run("--part-rows", "30", *options)
    assert result.returncode == 1, result.stderr
    assert ("the engine made no step for 2 s and was ended" in result.stderr) == (what == "HANGS")
    wrong = [row for row in run.rows() if "error" in row]
    assert wrong == [{"id": "row-33", "error": "line 34: at least 3 engines died or hung while they answered it"}]
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(60)]
    if what == "HANGS":
        return
    del run.env[f"FAST_WORKER_{what}"]
    assert run("--resume").returncode == 1
    assert run("--resume", "--retry-errors").returncode == 0
    assert not [row for row in run.rows() if "error" in row] and len(run.rows()) == 60


def test_two_coordinators_and_the_status_meanwhile(batch: Make) -> None:
    run = batch(400, FAST_WORKER_DELAY="0.3")
    first = run.start("--replicas", "2", "--max-num-seqs", "4")
    try:
        wait_until(run.at_work, "a replica is at work")
        assert "another tpctl batch is writing" in said(run("--resume"))
        status = run.status()
        assert status["state"] == "running" and status["total"] == 400 and status["wanted"] == 2
        assert {one["state"] for one in status["replicas"]} <= {"starting", "working"}
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=PATIENCE)
        assert first.returncode == 130 and "interrupted; finished rows are kept in" in err
    finally:
        first.kill()
    assert run.status()["state"] == "interrupted" and not run.left()
    run.env["FAST_WORKER_DELAY"] = "0"
    assert run("--resume", "--replicas", "2").returncode == 0
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(400)]


def test_a_full_disk_is_one_line_and_costs_no_row(batch: Make) -> None:
    run = batch(600)
    full = run("--part-rows", "300", "--replicas", "2", shell="ulimit -f 24")
    assert full.returncode == 1 and "files may not be that large here" in said(full), full.stderr
    assert not run.left() and run.status()["state"] == "failed" and not names(run.folder.leases)
    kept = sum((place / name).read_bytes().count(b"\n") for place in (run.folder.kept,) for name in names(place))
    assert run("--resume").returncode == 0
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(600)]
    assert kept > 0


def test_a_folder_that_vanishes_is_one_line_and_goes_on_when_it_is_back(batch: Make) -> None:
    run = batch(400, FAST_WORKER_DELAY="0.3")
    process = run.start("--max-num-seqs", "4")
    wait_until(run.at_work, "a replica is at work")
    away = run.out.rename(run.out.with_name("away"))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    line = said(err)
    assert "is gone; bring it back" in line or "cannot write" in line
    wait_until(lambda: not run.left(), "its processes end")
    assert not run.out.exists()
    away.rename(run.out)
    run.env["FAST_WORKER_DELAY"] = "0"
    assert run("--resume").returncode == 0
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(400)]


JUMPS = """
import random, time
original = time.time
time.time = lambda: original() + random.uniform(-1e8, 1e8)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def test_clocks_that_jump_change_nothing(batch: Make, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(JUMPS)
    run = batch(300, PYTHONPATH=str(tmp_path / "site"))
    result = run("--replicas", "2")
    assert result.returncode == 0, result.stderr
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(300)]


def test_a_replica_from_elsewhere_takes_part(batch: Make) -> None:
    """One that was started by hand, as SLURM or ssh would on another host."""
    run = batch(400, FAST_WORKER_DELAY="0.1")
    process = run.start("--max-num-seqs", "4")
    wait_until(lambda: run.folder.spec.exists(), "the batch has begun")
    command = [sys.executable, "-m", "tpctl", "replica", str(run.out), "--name", "guest"]
    guest = subprocess.Popen(command, env=run.env, stderr=subprocess.PIPE, text=True)
    assert process.wait(PATIENCE) == 0
    _, err = guest.communicate(timeout=PATIENCE)
    assert guest.returncode == 0 and not err.startswith("0 rows"), err
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(400)]


def test_whoever_is_killed_every_row_is_there_once(model: str, tmp_path: Path) -> None:
    options = ("--tp", "1", "--model", model)
    report = batch_kills.run(tmp_path, rows=3000, replicas=2, kills=5, seed=1, options=options, calm_replicas=1)
    assert not report.wrong and sum(report.kills.values()) == 5


def test_with_the_real_engine_and_several_ranks(small: str, tmp_path: Path) -> None:
    options = ("--tp", "2", "--model", small, "--kv-cache-memory", "16MiB", "--max-num-seqs", "8")
    kills = {"replicas": 2, "calm_replicas": 1, "kills": 1, "seed": 4}
    report = batch_kills.run(tmp_path, rows=120, engine="demo", options=options, **kills)
    assert not report.wrong and sum(report.kills.values()) == 1
