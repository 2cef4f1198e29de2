"""``tpctl batch --hosts FILE``: by a program that stands for ssh, and where there is one by sshd on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.batch_jobs import PATIENCE, Runner, said, wait_until
from tests.distributed.batch_jobs import model as model  # a fixture
from tests.distributed.batch_kills import write_prompts
from tpctl.batch.folder import load
from tpctl.checkpoint.sources import ResolvedSource

HERE = Path(__file__).parent

# As ssh and sshd: the command gets another session, another folder, nothing of this environment but what the host sets,
# and the end of stdin when the connection is gone.
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
if [ "$2" = delta ]; then echo "ssh: connect to host delta port 22: Connection refused" >&2; exit 255; fi
cd /
exec 3<&0 # what runs in the background would else read nothing
setsid env -i PATH=/usr/bin:/bin "HOME=$HOME" "TPCTL_BATCH_TEST=$TPCTL_BATCH_TEST" \\
    sh -c "$3" <&3 &
wait $!
"""


@pytest.fixture(params=["a stand-in", "sshd"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A PATH on which ssh reaches alpha, beta and gamma, and not delta."""
    folder = tmp_path / "ssh"
    (folder / "bin").mkdir(parents=True)
    if request.param == "sshd":
        if shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip("no sshd here (apt-get install openssh-server)")
        if os.geteuid() != 0:
            pytest.skip("sshd starts sessions as other users, for which it has to be root")
        if subprocess.run([HERE / "ssh_hosts.sh", "start", folder]).returncode:
            pytest.skip("sshd does not start here, see above")
    else:
        (folder / "bin" / "ssh").write_text(SSH)
        (folder / "bin" / "ssh").chmod(0o755)
    yield f"{folder / 'bin'}:{os.environ['PATH']}"
    if request.param == "sshd":
        subprocess.run([HERE / "ssh_hosts.sh", "stop", folder], check=True)


def started(model: str, tmp_path: Path, path: str, hosts: str, rows: int, **env: str) -> Runner:
    (tmp_path / "hosts").write_text(hosts)
    run = Runner(model, write_prompts(tmp_path / "prompts.jsonl", rows), tmp_path / "out", {"PATH": path, **env})
    run.env["TPCTL_FAST_DELAY"] = env.get("FAST_WORKER_DELAY", "0")  # passed on, since sshd passes nothing else
    run.command += ["--hosts", str(tmp_path / "hosts")]
    return run


def replicas(run: Runner) -> list[int]:
    """Replicas of this batch, on whatever host: processes that name its folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"replica" in words and str(run.out).encode() in words and b"python" in words[0]:
            found.append(int(entry.name))
    return found


@pytest.mark.daily(2)
def test_replicas_by_ssh_one_is_killed_and_a_host_is_not_there(model: str, tmp_path: Path, path: str) -> None:
    run = started(model, tmp_path, path, "alpha slots=2\nbeta\ndelta slots=2\n", 600, FAST_WORKER_DELAY="0.2")
    process = run.start("--max-num-seqs", "8")
    wait_until(run.at_work, "a replica is at work")
    os.kill(replicas(run)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(600)]
    assert err.count("delta cannot be reached (ssh: connect to host ") == 1 and "not started again" in err
    assert "was killed (SIGKILL) (on " in err and "started again" in err
    wait_until(lambda: not replicas(run), "replicas end")


@pytest.mark.daily(2)
def test_a_coordinator_that_is_killed_takes_its_replicas_along(model: str, tmp_path: Path, path: str) -> None:
    run = started(model, tmp_path, path, "alpha\nbeta\n", 400, FAST_WORKER_DELAY="0.3")
    process = run.start("--max-num-seqs", "4")
    wait_until(run.at_work, "a replica is at work")
    assert len(replicas(run)) == 2
    process.kill()
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: not replicas(run), "replicas end")
    run.env["TPCTL_FAST_DELAY"] = run.env["FAST_WORKER_DELAY"] = "0"
    done = run("--resume")
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(400)]


@pytest.mark.daily(2)
def test_a_share_that_vanishes_is_one_line_and_goes_on_when_it_is_back(model: str, tmp_path: Path, path: str) -> None:
    run = started(model, tmp_path, path, "alpha\nbeta\n", 400, FAST_WORKER_DELAY="0.3")
    process = run.start("--max-num-seqs", "4")
    wait_until(run.at_work, "a replica is at work")
    away = run.out.rename(run.out.with_name("away"))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and ("is gone; bring it back" in said(err) or "cannot write" in said(err)), err
    wait_until(lambda: not replicas(run), "replicas end")
    assert not run.out.exists()
    away.rename(run.out)
    run.env["TPCTL_FAST_DELAY"] = run.env["FAST_WORKER_DELAY"] = "0"
    done = run("--resume")
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(400)]


@pytest.mark.skipif(shutil.which("faketime") is None, reason="no faketime here (apt-get install faketime)")
def test_hosts_whose_clocks_are_years_apart_and_run_faster(model: str, tmp_path: Path) -> None:
    (tmp_path / "ssh").mkdir()
    clock = """case $2 in alpha) when="-9y x1.5";; *) when="+5y x0.7";; esac"""
    text = SSH.replace("cd /\n", f"cd /\n{clock}\n").replace('sh -c "$3"', 'faketime -f "$when" sh -c "$3"')
    (tmp_path / "ssh" / "ssh").write_text(text)
    (tmp_path / "ssh" / "ssh").chmod(0o755)
    path = f"{tmp_path / 'ssh'}:{os.environ['PATH']}"
    run = started(model, tmp_path, path, "alpha\nbeta\n", 300, FAST_WORKER_DELAY="0.1")
    done = run("--max-num-seqs", "8")
    assert done.returncode == 0 and "started again" not in done.stderr, done.stderr
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(300)]


def test_hosts_of_which_none_is_there(model: str, tmp_path: Path, path: str) -> None:
    run = started(model, tmp_path, path, "delta slots=2\n", 10)
    done = run()
    assert done.returncode == 1 and "no replica stays alive; the last one delta cannot be reached" in said(done)
    state = load(run.folder.state)
    assert state is not None and state["state"] == "failed"


def test_two_replicas_that_start_at_once_cut_the_model_once(demo: ResolvedSource, tmp_path: Path) -> None:
    """Into the cache of a host that never ran it."""
    run = Runner(str(demo.folder), write_prompts(tmp_path / "prompts.jsonl", 200), tmp_path / "out", {})
    run.env["FAST_WORKER_DELAY"] = "0.2"
    coordinator = run.start("--replicas", "0", "--max-num-seqs", "8")
    wait_until(run.folder.spec.exists, "the batch has begun")
    env = {**run.env, "TPCTL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tpctl", "replica", str(run.out), "--wait", "60", "--name"]
    both = [subprocess.Popen([*command, name], env=env, stderr=subprocess.PIPE, text=True) for name in ("one", "other")]
    _, err = coordinator.communicate(timeout=PATIENCE)
    assert coordinator.returncode == 0 and f"waiting for replicas: `tpctl replica {run.out}`" in err, err
    for process in both:
        _, text = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and " rows, " in text, text
    shards = [folder.name for folder in (tmp_path / "cache" / "shards").iterdir() if not folder.name.startswith(".")]
    assert len(shards) == 1, shards
    assert [row["id"] for row in run.rows()] == [f"row-{number}" for number in range(200)]


@pytest.mark.daily(2)
def test_tables_and_openai_lines_by_ssh(model: str, tmp_path: Path, path: str) -> None:
    """What replicas elsewhere are told of formats; one of them is killed as it answers, and its rows are kept."""
    run = started(model, tmp_path, path, "alpha slots=2\nbeta\n", 240, FAST_WORKER_DELAY="0.2")
    numbers = range(240)
    table = pa.table({"q": [f"line {n}" for n in numbers], "key": [n * 3 for n in numbers], "raw": [b"x"] * 240})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=50)
    run.command[4] = str(tmp_path / "in.parquet")
    run.command += ["--prompt-column", "q", "--id-column", "key", "--keep-columns", "raw", "--step-timeout", "60"]
    process = run.start("--max-num-seqs", "8")
    wait_until(run.at_work, "a replica is at work")
    assert {one["host"] for one in run.status()["replicas"]} == {os.uname().nodename}
    os.kill(replicas(run)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    found = pa.concat_tables([pq.read_table(part) for _, part in sorted(run.folder.parts().items())])
    assert found["id"].to_pylist() == [n * 3 for n in numbers]
    assert found["raw"].to_pylist() == [b"x"] * 240 and found["error"].null_count == 240
    stats = load(run.folder.stats)
    assert stats is not None and stats["rows"] == 240

    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    url = "/v1/chat/completions"
    lines = [{"custom_id": f"q{n}", "method": "POST", "url": url, "body": {**chat, "n": 1 + n % 2}} for n in range(60)]
    prompts = tmp_path / "openai.jsonl"
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    other = started(model, tmp_path, path, "alpha\nbeta\n", 1)
    other.command[4:7] = [str(prompts), "-o", f"{tmp_path / 'answers'}/"]
    done = other()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for part in sorted((tmp_path / "answers").glob("part-*")) for line in part.open()]
    assert [row["custom_id"] for row in rows] == [f"q{n}" for n in range(60)]
    assert [len(row["response"]["body"]["choices"]) for row in rows] == [1 + n % 2 for n in range(60)]
