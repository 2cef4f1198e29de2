"""Signs of life: counts that move, seen by the watcher's own clock; whatever clocks do, nobody is buried alive."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_replicas import write_prompts
from tpctl.batch import claim, signs
from tpctl.batch.claim import claimed
from tpctl.batch.coordinator import Coordinator
from tpctl.batch.folder import JobFolder, load, put
from tpctl.batch.formats.choose import plain
from tpctl.batch.local import Death, Local, Slot, why_ended
from tpctl.batch.plan import Division, Plan
from tpctl.batch.replica import Replica
from tpctl.batch.roll import Roll
from tpctl.batch.signs import PATIENCE, Signs, Watch, is_locked, lock
from tpctl.errors import EngineError, OutputError, SourceError, UsageError
from tpctl.launch import places as launch_places
from tpctl.launch.places import cores_of, places

ROOT = Path(__file__).parent.parent.parent / "tpctl" / "batch"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    found = JobFolder(tmp_path / "out")
    found.make()
    return found


def sign(path: Path, count: int, **more: Any) -> None:
    put(path, {"count": count, "machine": "another", "state": "working", **more})


def test_a_count_that_moves_is_life_and_one_that_does_not_is_silence(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "s.json"
    watch = Watch(path, tmp_path / "s.lock", clock)
    for count in range(1, 100):
        sign(path, count)
        clock.now += 0.9
        assert watch.look()
    for _ in range(int(PATIENCE) + 2):
        clock.now += 0.9
        alive = watch.look()
    clock.now += 5
    assert alive and watch.silent > PATIENCE - 3
    for _ in range(4):
        clock.now += 1
        alive = watch.look()
    assert not alive and not watch.gone
    sign(path, 100)
    assert watch.look()


def test_a_watcher_that_slept_blames_nobody(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "s.json"
    watch = Watch(path, tmp_path / "s.lock", clock)
    sign(path, 1)
    assert watch.look()
    clock.now += 1e6
    assert watch.look()
    clock.now -= 2e6
    assert watch.look() and watch.silent <= 2


def test_on_the_same_machine_a_lock_tells_at_once(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "s.json", tmp_path / "s.lock")
    held = lock(tmp_path / "s.lock")
    assert held is not None and lock(tmp_path / "s.lock") is None
    sign(tmp_path / "s.json", 1, machine=signs.machine())
    assert watch.look() and watch.locked
    held.close()
    assert not watch.look() and watch.gone
    assert is_locked(tmp_path / "nothing") is False


def test_who_says_that_it_ended_has(tmp_path: Path) -> None:
    for state in ("ended", "failed"):
        watch = Watch(tmp_path / "s.json", tmp_path / "s.lock")
        sign(tmp_path / "s.json", 1, state=state)
        assert not watch.look() and watch.gone


def test_no_clock_but_ones_own_is_read() -> None:
    """Neither the time of day nor that of a file decides anything: clocks jump, and hosts' differ."""
    wall = {"time", "time_ns", "st_mtime", "st_mtime_ns", "st_ctime", "st_atime", "getmtime"}
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in wall, f"{file.name}: {node.attr}"
                # For people to read: when a run began, and may end.
                assert node.attr != "now" or file.name in ("coordinator.py", "status.py"), file.name


def test_the_roll_tells_who_died_from_who_left_and_from_who_was_gone_before(folder: JobFolder) -> None:
    clock = Clock()
    sign(folder.replicas / "before.json", 1, machine=signs.machine())
    roll = Roll(folder, clock)
    roll.look()
    assert not roll.alive("before") and not roll.mourned("before")
    assert not (folder.replicas / "before.json").exists()
    held = {name: lock(folder.replicas / f"{name}.lock") for name in ("dies", "leaves", "stays")}
    for name in held:
        sign(folder.replicas / f"{name}.json", 1, machine=signs.machine(), rows=5)
    clock.now += 1
    roll.look()
    assert sorted(roll.living()) == ["dies", "leaves", "stays"] and roll.sum("rows") == 15
    held["dies"].close()
    sign(folder.replicas / "leaves.json", 2, machine=signs.machine(), rows=7, state="ended")
    clock.now += 1
    roll.look()
    assert sorted(roll.living()) == ["stays"] and roll.sum("rows") == 17
    assert roll.mourned("dies") and not roll.mourned("leaves")
    assert roll.alive("never-met")
    sign(folder.replicas / "far.json", 1)
    clock.now += 1
    roll.look()
    sign(folder.replicas / "far.json", 2, fatal=True, reason="no model here", state="failed", host="far-host")
    clock.now += 1
    roll.look()  # another machine may lack what the others have
    assert roll.lost() == [("far", "no model here (on far-host)")] and not roll.lost()
    dead = {"fatal": True, "reason": "the input changed", "state": "failed", "machine": signs.machine()}
    sign(folder.replicas / "stays.json", 2, **dead)
    clock.now += 1
    with pytest.raises(SourceError, match="the input changed"):
        roll.look()


def test_what_lives_took_is_counted_once_whoever_is_killed(folder: JobFolder) -> None:
    clock = Clock()
    held = lock(folder.replicas / "r.lock")
    assert held is not None

    def says(life: str, seconds: float) -> None:
        sign(folder.replicas / "r.json", int(seconds), machine=signs.machine(), life=life, seconds=seconds)

    def spent() -> float:
        """Of a coordinator that begins now, twice."""
        found = set()
        for _ in range(2):
            roll = Roll(folder, clock)
            for _ in range(2):
                roll.look(now=True)
                found.add(roll.spent("seconds"))
            roll.close()
        assert len(found) == 1
        return found.pop()

    says("a", 5)
    assert spent() == 5
    says("a", 7)
    kept = (folder.replicas / "r.json").read_bytes()
    assert spent() == 7
    held.close()  # it was killed, while no coordinator was there
    assert spent() == 7 and not (folder.replicas / "r.json").exists()
    (folder.replicas / "r.json").write_bytes(kept)  # the coordinator, after it had written that down
    assert spent() == 7
    with folder.lives.open("ab") as log:
        log.write(b'{"life": "b", "sec')  # a full disk
    held = lock(folder.replicas / "r.lock")
    assert held is not None
    says("c", 2)  # another one of that name
    assert spent() == 9
    held.close()
    assert spent() == 9 and len(folder.lives.read_bytes().splitlines()) == 3


def test_what_lives_took_and_a_full_disk(folder: JobFolder) -> None:
    sign(folder.replicas / "r.json", 1, life="a", seconds=1, state="ended")
    roll = Roll(folder, Clock())
    folder.lives.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="the disk is full"):
        roll.look(now=True)
    roll.close()
    assert (folder.replicas / "r.json").exists()  # it is counted when there is room


def test_a_replica_that_is_stopped_is_silent_and_killed(folder: JobFolder) -> None:
    clock = Clock()
    roll = Roll(folder, clock)
    held = lock(folder.replicas / "r.lock")
    assert held is not None
    sign(folder.replicas / "r.json", 1, machine=signs.machine())
    for _ in range(int(PATIENCE) + 3):
        roll.look()
        clock.now += 1
    assert roll.silent() == ["r"] and not roll.alive("r") and roll.mourned("r")
    local = Local(folder.root, [Slot(0, None)], "t", command=(sys.executable, "-c", "import time; time.sleep(600)"))
    local.start_due()
    process = local.slots[0].process
    assert process is not None
    local.slots[0].name = "r"
    local.kill_silent([])
    assert process.poll() is None
    local.kill_silent(roll.silent())
    assert process.wait(60) == -9
    sign(folder.replicas / "r.json", 2, machine=signs.machine())
    clock.now += 1
    roll.look()
    assert not roll.silent() and roll.alive("r")
    held.close()


def test_signs_are_given_until_they_are_stopped_and_a_failure_is_kept(folder: JobFolder) -> None:
    given = Signs(folder.state, lambda: {"state": "working"})
    first = load(folder.state)
    given.write()
    second = load(folder.state)
    assert first is not None and second is not None and second["count"] > first["count"]
    given.stop()
    shutil.rmtree(folder.root)
    with pytest.raises(OutputError):
        given.write()


def test_a_second_coordinator_is_refused_by_one_line(folder: JobFolder) -> None:
    refused = pytest.raises(OutputError, match=r"another tpctl batch is writing .*out; wait for it")
    with claimed(folder), refused, claimed(folder):
        raise AssertionError("both have it")
    with claimed(JobFolder(folder.root)):
        pass
    assert not folder.root.exists()  # nothing began in it


def test_one_on_another_machine_is_seen_by_its_signs(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.manifest.write_text("{}")
    sign(folder.state, 1, state="running")
    given = iter(range(2, 1000))

    def sleep(seconds: float) -> None:
        sign(folder.state, next(given), state="running")

    monkeypatch.setattr(claim, "_OTHERS_SIGN", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(claim.time, "sleep", sleep)
        with pytest.raises(OutputError, match="another tpctl batch is writing"), claimed(folder):
            pass
    with claimed(folder):  # it is silent now
        pass


def test_a_coordinator_that_was_taken_over_ends(folder: JobFolder, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 3)
    plan = Plan(folder, plain(prompts), Division(2))
    taken_over = pytest.raises(OutputError, match=r"has taken .*out over")
    with taken_over, Coordinator(folder, plan, Local(folder.root, [], "")) as coordinator:
        state = load(folder.state)
        assert state is not None
        put(folder.state, {**state, "generation": state["generation"] + 1})
        coordinator.run(lambda progress: None, lambda: False)
    after = load(folder.state)
    assert after is not None and after["generation"] == state["generation"] + 1, "it wrote over the other one's"


def test_a_name_is_one_replicas(folder: JobFolder) -> None:
    with Replica(folder, "r", 1), pytest.raises(OutputError, match="a replica r is at work"), Replica(folder, "r", 1):
        pass
    state = load(folder.replicas / "r.json")
    assert state is not None and state["state"] == "ended"
    with pytest.raises(EngineError), Replica(folder, "r", 1):
        raise EngineError("rank 0 was killed")
    state = load(folder.replicas / "r.json")
    assert state is not None and (state["state"], state["reason"], state["fatal"]) == (
        "failed",
        "rank 0 was killed",
        False,
    )


def test_where_replicas_find_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_places, "visible_gpus", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places(None, 4, "cuda", False) == ["0,1,2,3", "4,5,6,7"]
    assert places(3, 2, "cuda", False) == ["0,1", "2,3", "4,5"]
    with pytest.raises(UsageError, match="--replicas 5 with --tp 2 need 10 GPUs, but 8 visible"):
        places(5, 2, "cuda", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert places(None, 1, "cuda", False) == ["GPU-a", "GPU-b"]
    assert places(4, 1, "cuda", True) == ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]
    assert places(3, 2, "cpu", False) == [None] * 3
    assert places(None, 1, "cpu", False) == [None] * len(places(None, 1, "cpu", False))


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6, 8})
    assert [cores_of(replica, 2) for replica in range(2)] == [{0, 2}, {4, 6, 8}]
    assert cores_of(0, 6) is None


@pytest.mark.parametrize(
    ("code", "last", "reason", "fatal"),
    [
        (-9, "", "was killed (SIGKILL)", False),
        (143, "tpctl: interrupted", "was killed (SIGTERM)", False),
        (143, "tpctl: rank 0 hung", "rank 0 hung", False),
        (75, "tpctl: rank 0 was killed (SIGKILL)", "rank 0 was killed (SIGKILL)", False),
        (1, "tpctl: cannot write x: the disk is full", "cannot write x: the disk is full", True),
        (1, "ValueError: oh", "ValueError: oh", False),
        (3, "", "ended with exit code 3", False),
    ],
)
def test_why_a_replica_ended(code: int, last: str, reason: str, fatal: bool) -> None:
    assert why_ended(code, last) == (reason, fatal)


def test_a_replica_that_dies_at_once_is_started_again_and_then_given_up(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; print('tpctl: no room', file=sys.stderr); sys.exit(75)")
    local = Local(tmp_path, [Slot(0, None)], "t", command=command, backoff=0.001)
    found: list[Death] = []
    deadline = time.monotonic() + 60
    while not local.all_given_up and time.monotonic() < deadline:
        local.start_due()
        found += local.deaths({})
        time.sleep(0.005)
    assert [death.name for death in found] == [f"0-t-{number}" for number in range(1, 6)]
    assert {death.reason for death in found} == {"no room"} and not any(death.fatal for death in found)
    local.start_due()
    assert local.slots[0].process is None


def test_replicas_that_do_not_end_are_killed(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    local = Local(tmp_path, [Slot(0, None)], "t", command=(sys.executable, "-c", code))
    local.start_due()
    process = local.slots[0].process
    assert process is not None
    local.kill()
    assert process.returncode == -9 and local.slots[0].process is None


def test_json_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", "null"):
        (tmp_path / "x").write_text(text)
        assert load(tmp_path / "x") is None
    put(tmp_path / "x", {"a": "é"})
    assert load(tmp_path / "x") == json.loads('{"a": "é"}') and [file.name for file in tmp_path.iterdir()] == ["x"]
