"""Replicas on other hosts: hosts from a file, shares of a SLURM job, and what becomes of those that end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tpctl.batch import launchers, slurm, ssh
from tpctl.batch.folder import JobFolder, load, put
from tpctl.batch.formats.choose import Asked, FormatSpec
from tpctl.batch.launchers import Wanted, launcher
from tpctl.batch.local import MOST_STARTS, Death, Slot
from tpctl.batch.replica import await_batch
from tpctl.batch.signs import lock, machine
from tpctl.batch.slurm import Slurm, allocation, share_of
from tpctl.batch.spec import JobSpec
from tpctl.batch.ssh import Host, Ssh, passed_environment, read_hosts, ssh_slots
from tpctl.cli.replica import of_share, parse_share, replica
from tpctl.client.prepare import EngineArgs
from tpctl.errors import SourceError, UsageError

SSH = """#!/bin/sh
# Knows its hosts by name; what ssh runs there is not run.
while [ "$1" != -- ]; do shift; done
echo "$2 $3" >> "$0.calls"
case $2 in
gone) echo "ssh: connect to host gone port 22: Connection refused" >&2; exit 255;;
bare) echo "/bin/sh: 1: exec: python: not found" >&2; exit 127;;
full) echo "tpctl: rank 0 was killed (SIGKILL)" >&2; exit 75;;
ended) echo "tpctl: interrupted" >&2; exit 143;;
other) echo "tpctl: /rows holds no batch to answer lines of" >&2; exit 1;;
*) cat; echo "left in order" >&2; exit 0;;
esac
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "ssh"
    path.write_text(SSH)
    path.chmod(0o755)
    return path


def hosts_of(tmp_path: Path, text: str) -> list[Host]:
    (tmp_path / "hosts").write_text(text)
    return read_hosts(tmp_path / "hosts")


def test_a_file_of_hosts(tmp_path: Path) -> None:
    text = "# ours\ngpu01 slots=4 # eight GPUs\n\n  me@gpu02.cluster\treplicas=2\nssh://me@10.0.0.3:2222\n"
    wanted = [Host("gpu01", 4), Host("me@gpu02.cluster", 2), Host("ssh://me@10.0.0.3:2222", 1)]
    assert hosts_of(tmp_path, text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# nobody\n\n", "hosts names no host; give one host a line"),
        ("a\n-oProxyCommand=x\n", r'line 2 of .*hosts: "-oProxyCommand=x" is no host\'s name'),
        ("a; rm", r'line 1 of .*"a;" is no host'),
        ("a\nb\na slots=2\n", "line 3 of .*hosts: a is there twice"),
        ("a slots=0", r'line 1 of .*"slots=0" is not understood; slots=N, from 1 to 1024'),
        ("a 4", r'"4" is not understood'),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        hosts_of(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read the hosts in .*absent: No such file"):
        read_hosts(tmp_path / "absent")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="it is no text"):
        read_hosts(tmp_path / "b")


def run(local: Ssh, enough: Callable[[list[Death]], bool], answered: dict[str, int] | None = None) -> list[Death]:
    found: list[Death] = []
    deadline = time.monotonic() + 120
    while not enough(found) and time.monotonic() < deadline:
        local.start_due()
        found += local.deaths(answered or {})
        time.sleep(0.01)
    return found


def started(tmp_path: Path, program: Path, text: str) -> Ssh:
    slots = ssh_slots(hosts_of(tmp_path, text))
    return Ssh(tmp_path, slots, "t", backoff=0.001, program=(str(program),))


def test_a_host_that_cannot_be_reached_is_one_line_and_others_go_on(tmp_path: Path, program: Path) -> None:
    local = started(tmp_path, program, "gone slots=3\nbare\nwell\n")
    found = run(local, lambda found: len(found) >= 2)
    time.sleep(0.3)
    found += local.deaths({})
    assert sorted(death.reason for death in found) == [
        "bare cannot run tpctl (/bin/sh: 1: exec: python: not found)",
        "gone cannot be reached (ssh: connect to host gone port 22: Connection refused)",
    ]
    assert {death.again for death in found} == {"not started again"} and not any(death.fatal for death in found)
    assert [slot.given_up for slot in local.slots] == [True] * 4 + [False] and not local.all_given_up
    local.stop(0.0, [])
    assert "left in order" in log_of(local.slots[4])


def test_replicas_that_are_killed_since_their_host_is_given_up_say_why(tmp_path: Path) -> None:
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\nmkdir {tmp_path / 'first'} || exec sleep 60\necho 'ssh: no route' >&2\nexit 255\n")
    program.chmod(0o755)
    local = started(tmp_path, program, "gone slots=3\n")
    (death,) = run(local, bool)
    time.sleep(0.2)
    assert local.deaths({}) == [] and local.all_given_up
    assert {slot.reason for slot in local.slots} == {death.reason} == {"gone cannot be reached (ssh: no route)"}


def log_of(slot: Slot) -> str:
    assert slot.log is not None
    slot.log.seek(0)
    return slot.log.read().decode()


def test_a_host_that_was_reached_has_the_rule_of_five(tmp_path: Path, program: Path) -> None:
    local = started(tmp_path, program, "gone\nfull\n")
    heard = {f"gone-0-t-{number}": 0 for number in range(1, 9)}
    found = run(local, lambda found: local.all_given_up, heard)
    assert [death.name for death in found if "gone" in death.name] == [f"gone-0-t-{n}" for n in range(1, 6)]
    assert len(found) == 2 * MOST_STARTS
    assert {death.reason for death in found} == {
        "rank 0 was killed (SIGKILL) (on full)",
        "ssh: connect to host gone port 22: Connection refused (on gone)",
    }


def test_a_replica_that_a_signal_ended_there_is_told_by_it(tmp_path: Path, program: Path) -> None:
    (death,) = run(started(tmp_path, program, "ended\n"), bool)
    assert not death.fatal and death.reason == "was killed (SIGTERM) (on ended)"


def test_what_no_start_would_mend_there_ends_no_batch(tmp_path: Path, program: Path) -> None:
    (death,) = run(started(tmp_path, program, "other\n"), bool)
    assert not death.fatal and death.again == "not started again"
    assert death.reason == "/rows holds no batch to answer lines of (on other)"


def test_a_replica_there_is_tied_and_told_no_secret(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JOB_ID", "TPCTL_CACHE", "HF_HOME", "PYTHONPATH"):
        monkeypatch.setenv(name, f"the {name}")
    local = started(tmp_path, program, "well slots=2\n")
    local.start_due()
    local.stop(0.0, [])
    calls = program.with_name("ssh.calls").read_text().splitlines()
    assert len(calls) == 2 and not any("TOKEN" in call or "SECRET" in call or "SLURM" in call for call in calls)
    (first,) = [call for call in calls if "--share 1/2" in call]
    assert first.startswith("well exec /bin/sh -c ") and "'\"'\"'TPCTL_CACHE=the TPCTL_CACHE'\"'\"'" in first
    assert f"{sys.executable} -m tpctl replica {tmp_path} --name well-0-t-1 --tied --share 1/2; exit $?" in first
    assert set(passed_environment({"HF_TOKEN": "x", "TPCTL_CACHE": "y", "HOME": "z"})) <= {"TPCTL_CACHE", "PYTHONPATH"}


def test_a_replica_that_does_not_leave_is_killed(tmp_path: Path, program: Path) -> None:
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    local = started(tmp_path, program, "well\n")
    local.start_due()
    process = local.slots[0].process
    assert process is not None
    local.kill_silent([local.slots[0].name])
    assert process.wait(60) == -9
    (death,) = run(local, bool, {local.slots[0].name: 3})
    assert death.reason == "was killed (SIGKILL) (on well)" and death.again == "started again"


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "8(x2)", "PATH": os.environ["PATH"]}


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "srun"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\necho "$OMP_NUM_THREADS $SLURM_JOB_ID/$SLURM_NTASKS$SLURM_GPUS $*" >> "$0.calls"\nexec cat\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(JOB, "PATH", os.environ["PATH"])
    return path


@pytest.mark.usefixtures("srun")
def test_a_job_is_divided_among_its_tasks() -> None:
    found = allocation({**JOB, "SLURM_NTASKS": "4"}, None, 1)
    assert (found.tasks, found.cores, found.nodes, found.on_a_host, found.gpus) == (4, 4, 2, 2, False)
    assert share_of(found, 1, None) == ("--cpus-per-task=4",)
    assert allocation(JOB, 5, 1).cores == 2  # three fit a node of eight, so two each of two nodes would not do
    assert allocation(JOB, None, 1).tasks == 2  # no tasks are named: one a node
    gpus = {**JOB, "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_GPUS": "0,1,2,3,4,5,6,7", "SLURM_MEM_PER_NODE": "4000"}
    found = allocation(gpus, None, 2)
    assert (found.tasks, found.memory) == (8, 1000)
    assert share_of(found, 2, None) == ("--cpus-per-task=2", "--gpus-per-task=2", "--mem=1000")
    assert share_of(found, 2, "cpu") == ("--cpus-per-task=2", "--gres=none", "--mem=1000")
    assert slurm._dealt("4(x2),2") == [4, 4, 2]


def test_where_there_is_no_job_or_no_room(srun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--hosts slurm needs a SLURM job"):
        allocation({}, None, 1)
    with pytest.raises(UsageError, match="17 replicas are more than the 16 CPUs of SLURM job 7"):
        allocation(JOB, 17, 1)
    with pytest.raises(UsageError, match="needs srun"):
        allocation({**JOB, "PATH": "/nowhere"}, None, 1)


def test_each_step_is_one_task_with_its_share(srun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {**JOB, "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS": "4"}.items():
        monkeypatch.setenv(name, value)
    local, on_a_host = launcher(tmp_path / "rows", Wanted(None, "slurm", 2, None, False))
    assert isinstance(local, Slurm) and len(local.slots) == 2 and on_a_host == 1
    local.start_due()
    local.stop(0.0, [])
    first = sorted(srun.with_name("srun.calls").read_text().splitlines())[0]
    # The script's own number of tasks and cores a task are not the step's.
    assert first.startswith("4 7/ --nodes=1 --ntasks=1 --exact --mpi=none")
    assert (
        f"--cpus-per-task=8 --gpus-per-task=2 {sys.executable} -m tpctl replica {tmp_path / 'rows'} --name 0-" in first
    )
    assert first.endswith(" --tied")


def test_a_step_ends_by_sruns_own_way(tmp_path: Path, srun: Path) -> None:
    """SIGTERM has srun kill its tasks; SIGKILL would leave them to run."""
    srun.write_text("#!/bin/sh\ntrap 'echo told > \"$0.told\"; exit 137' TERM\nwhile :; do sleep 0.05; done\n")
    local = Slurm(tmp_path, [Slot(0, None)], "t")
    local.start_due()
    process = local.slots[0].process
    assert process is not None
    time.sleep(0.5)
    local.kill_silent([local.slots[0].name])
    assert process.wait(60) == 137 and srun.with_name("srun.told").exists()
    (death,) = local.deaths({})
    assert death.reason == "was killed (SIGKILL)"


def test_which_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_of(tmp_path, "a slots=3\nb\n")
    monkeypatch.setattr(ssh.shutil, "which", lambda name: "/usr/bin/ssh")
    local, on_a_host = launcher(tmp_path, Wanted(None, str(tmp_path / "hosts"), 1, None, False))
    assert isinstance(local, Ssh) and [slot.number for slot in local.slots] == [0, 1, 2, 3] and on_a_host == 3
    with pytest.raises(UsageError, match=r"--replicas and --hosts .* say two things"):
        launcher(tmp_path, Wanted(4, str(tmp_path / "hosts"), 1, None, False))
    assert not launcher(tmp_path, Wanted(0, None, 1, "cpu", False))[0].slots
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UsageError, match="--replicas 0 and --hosts slurm say two things"):
        launcher(tmp_path, Wanted(0, "slurm", 1, None, False))
    assert len(launcher(tmp_path, Wanted(2, None, 1, "cpu", False))[0].slots) == 2
    monkeypatch.setattr(ssh.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="needs ssh, which is not on the PATH"):
        launcher(tmp_path, Wanted(None, str(tmp_path / "hosts"), 1, None, False))
    assert launchers.SLURM == "slurm"


def test_a_share_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_share(None) is None and parse_share("2/4") == (2, 4)
    for text in ("0/4", "5/4", "2", "a/b", "-1/2"):
        with pytest.raises(UsageError, match="but must be K/N"):
            parse_share(text)
    pinned: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
    assert of_share(EngineArgs(device="cpu"), 2, 4).engines_on_host == 4
    assert pinned == [{2, 3}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("tpctl.launch.device.visible_gpus", lambda: 4)
    of_share(EngineArgs(device="cuda", tp=2), 2, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_a_replica_that_is_early_waits_for_a_coordinator(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert not await_batch(folder, 0.0)
    folder.make()
    put(folder.state, {"count": 5, "machine": machine(), "state": "running"})
    assert not await_batch(folder, 0.0)  # it was killed: its lock is free
    held = lock(folder.lock)
    assert held is not None and await_batch(folder, 0.0)
    held.close()
    put(folder.state, {"count": 5, "machine": "another", "state": "running"})
    assert not await_batch(folder, 0.3)  # it gives no signs
    ticks = iter(range(1000))

    def clock() -> float:
        tick = next(ticks)
        put(folder.state, {"count": 5 + tick, "machine": "another", "state": "running"})
        return float(tick)

    assert await_batch(folder, 100.0, clock)
    put(folder.state, {"count": 9, "machine": "another", "state": "done"})
    assert not await_batch(folder, 1e9)


def test_a_process_that_is_tied_ends_with_its_stdin(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; from tpctl.launch.lifeline import tie_to_stdin\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); tie_to_stdin(); print('up', flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"up\n" and process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 143


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet"])
def test_a_host_that_does_not_see_the_input_says_so_before_it_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = JobFolder(tmp_path / "out")
    folder.make()
    read = name.partition(".")[2]
    formats = FormatSpec(str(tmp_path / name), read, read, Asked(), "demo")
    JobSpec(formats, "demo", "", EngineArgs(device="cpu"), {}, [], None).write(folder)
    monkeypatch.setattr("tpctl.client.prepare.prepare", lambda *_, **__: pytest.fail("it loads the model"))
    with pytest.raises(SourceError, match=f"cannot read .*{name}: No such file"):
        replica(folder.root, "r", None, None, False)
    said = load(folder.replicas / "r.json")
    assert said is not None and said["state"] == "failed" and said["fatal"]
