"""Batches under SLURM itself: its own daemons on the loopback (``slurm_cluster.sh``), one node, several tasks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.batch_kills import Batch, write_prompts
from tests.processes import with_variable
from tpctl.batch.folder import JobFolder, load
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.sharding.cache import ensure_sharded

ROOT = Path(__file__).parent.parent.parent
CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
PATIENCE = 240.0  # seconds that anything may take on a busy machine
MARK = "TPCTL_SLURM_TEST"
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here: {', '.join(MISSING)} (apt-get install slurmctld …)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts tasks as other users, for which it has to be root"),
]


@pytest.fixture(scope="module")
def model(demo: ResolvedSource) -> str:
    ensure_sharded(demo, 1)
    return str(demo.folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[dict[str, str]]:
    """The environment of commands that are to use it; ``tpctl`` is on the PATH there."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([CLUSTER, "start", folder], timeout=PATIENCE, capture_output=True, text=True)
    if started.returncode:
        subprocess.run([CLUSTER, "stop", folder], timeout=PATIENCE, capture_output=True)
        pytest.skip(f"SLURM's daemons do not start here: {started.stderr.strip()[-500:]}")
    tpctl = folder / "bin" / "tpctl"
    tpctl.parent.mkdir()
    tpctl.write_text(f'#!/bin/sh\nexec {sys.executable} -m tpctl "$@"\n')
    tpctl.chmod(0o755)
    scontrol = folder / "bin" / "scontrol"  # a job that is queued again begins after two minutes
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$REQUEUED"\n')
    scontrol.chmod(0o755)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{tpctl.parent}:{os.environ['PATH']}"}
    env |= {"TPCTL_WORKER": "tests.distributed.fast_worker", MARK: str(folder), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT)}
    try:
        yield env
    finally:
        subprocess.run([CLUSTER, "stop", folder], timeout=PATIENCE)
        for pid in with_variable(f"{MARK}={folder}"):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)


def submit(env: dict[str, str], folder: Path, script: str, *more: str) -> str:
    """Hand in one of the examples; the job's id."""
    options = ["--parsable", f"--output={folder}/%A-%a.log", f"--chdir={folder}", *more]
    asked = ["--device", "cpu", "--max-model-len", "256", "--max-tokens", "8", "--max-num-seqs", "16"]
    command = ["sbatch", *options, str(ROOT / "examples" / script), "prompts.jsonl", "rows/", *asked]
    done = subprocess.run(
        [*command, *env.get("ASKED", "").split()], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().partition(";")[0]


def running(env: dict[str, str], job: str) -> bool:
    asked = subprocess.run(["squeue", "-h", "-j", job], env=env, capture_output=True, text=True)
    return bool(asked.stdout.strip())


def check_rows(folder: Path, rows: int) -> None:
    job = JobFolder(folder / "rows")
    ids = [json.loads(line)["id"] for _, part in sorted(job.parts().items()) for line in part.open()]
    assert ids == [f"row-{number}" for number in range(rows)], logs(folder)


def logs(folder: Path) -> str:
    return "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))


def test_steps_that_are_killed_cost_no_row(cluster: dict[str, str], model: str) -> None:
    kills = [sys.executable, "-m", "tests.distributed.batch_kills", "--hosts", "slurm", "--model", model]
    job = ["salloc", "--quiet", "--ntasks=2", "--cpus-per-task=2"]
    command = [*job, *kills, "--rows", "1500", "--replicas", "2", "--kills", "3", "--delay", "0.3"]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0 and "every row once, in order, as undisturbed" in done.stdout, done.stdout + done.stderr
    assert "with 3 kills" in done.stdout


def test_a_job_that_is_told_to_end_ends_in_order_and_goes_on(
    cluster: dict[str, str], model: str, tmp_path: Path
) -> None:
    """Before its time limit it queues itself again; after scancel it does not."""
    write_prompts(tmp_path / "prompts.jsonl", 600)
    env = {**cluster, "ASKED": f"--model {model}", "FAST_WORKER_DELAY": "0.3", "REQUEUED": str(tmp_path / "requeued")}
    batch = Batch(tmp_path / "prompts.jsonl", tmp_path / "rows", 2, (), env)
    folder = JobFolder(tmp_path / "rows")
    before = 0
    for told in (["--batch", "--signal=USR1"], []):
        job = submit(env, tmp_path, "slurm_batch.sh", "--ntasks=2", "--cpus-per-task=2")
        wait_until(lambda: batch.rows() > before, "rows are there")  # noqa: B023 — it is called here
        subprocess.run(["scancel", *told, job], env=env, check=True)
        wait_until(lambda: not running(env, job), "the job ends")  # noqa: B023
        # SLURM may call a job ended whose steps are writing their last.
        wait_until(lambda: (load(folder.state) or {}).get("state") == "interrupted", "its end is written down")
        assert "interrupted; finished rows are kept in rows, go on with --resume" in logs(tmp_path)
        before = batch.rows()
        assert 0 < before < 600
    requeued = (tmp_path / "requeued").read_text().splitlines()
    assert len(requeued) == 1 and requeued[0] == f"requeue {int(job) - 1}"
    env["FAST_WORKER_DELAY"] = "0"
    job = submit(env, tmp_path, "slurm_batch.sh", "--ntasks=2", "--cpus-per-task=2")
    wait_until(lambda: not running(env, job), "the last job ends")
    check_rows(tmp_path, 600)


def test_a_job_array_over_a_shared_folder(cluster: dict[str, str], model: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 600)
    env = {**cluster, "ASKED": f"--model {model}", "FAST_WORKER_DELAY": "0.3"}
    job = submit(env, tmp_path, "slurm_array.sh", "--array=0-2", "--cpus-per-task=2")
    wait_until(lambda: not running(env, job), "the array ends")
    check_rows(tmp_path, 600)
    said = [(tmp_path / f"{job}-{element}.log").read_text() for element in (1, 2)]
    assert all(" rows, " in text and not text.startswith("0 rows") for text in said), said


def test_gpus_are_dealt_out_by_slurm(cluster: dict[str, str], tmp_path: Path) -> None:
    """What each step of a replica has: its own."""
    script = (
        "import sys; from pathlib import Path\n"
        "from tpctl.batch import slurm; from tpctl.batch.launchers import Wanted, launcher\n"
        "local, _ = launcher(Path('.'), Wanted(None, 'slurm', 2, None, False))\n"
        "slurm.sys.executable = sys.argv[1]\n"
        "local.start_due()\n"
        "for slot in local.slots: slot.process.wait(); slot.log.seek(0); print(slot.log.read().decode())\n"
    )
    shown = tmp_path / "shown"
    shown.write_text('#!/bin/sh\nsleep 2; echo "has $CUDA_VISIBLE_DEVICES of $SLURM_JOB_ID"\n')
    shown.chmod(0o755)
    job = ["salloc", "--quiet", "--ntasks=2", "--cpus-per-task=2", "--gpus=4", "--mem=2000"]
    command = [*job, sys.executable, "-c", script, str(shown)]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=PATIENCE)
    found = sorted(line.split()[1] for line in done.stdout.splitlines() if line.startswith("has "))
    assert found == ["0,1", "2,3"], done.stdout + done.stderr
