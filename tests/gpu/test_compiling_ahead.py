"""A rank is never worse off for what compiles beside it: whatever that meets, it is waited for in bounds, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

import triton
from triton.runtime.errors import PTXASError

from tests.processes import with_variable
from tpctl.distributed import TPGroup
from tpctl.engine import worker
from tpctl.engine.runners import ahead
from tpctl.engine.runners.ahead import Ahead, compile_one, processes
from tpctl.kernels.common import ahead as kernels
from tpctl.kernels.common.ahead import Compiled, KernelSpec, was_killed
from tpctl.kernels.common.launch import DeviceFacts
from tpctl.wire.settings import EngineConfig

pytestmark = pytest.mark.gpu  # with Triton; none is needed
CONFIG = EngineConfig(Path("shards"), 1, device="cuda")
SPECS = [KernelSpec("tpctl.kernels.common.norm", f"kernel {number}", "", "", "") for number in range(10)]


class FakeOrder(NamedTuple):
    """An engine with ``SPECS`` for kernels."""

    config: EngineConfig
    ranks: list[int]
    facts: DeviceFacts
    peers: bool
    digest: str = "whole-engine"

    @classmethod
    def of(cls, config: EngineConfig, group: TPGroup, ranks: Any) -> FakeOrder:
        return cls(config, list(ranks), DeviceFacts((9, 0), 132, 232448), False)

    def __getitem__(self, at: Any) -> Any:
        return tuple(self)[:4][at]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's, in which kernels are empty folders."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "Order", FakeOrder)
    monkeypatch.setattr(ahead, "rehearse", lambda order: ((spec, True) for spec in SPECS))
    monkeypatch.setattr(ahead, "compile_driver", lambda: None)
    monkeypatch.setattr(Compiled, "digest", lambda self, spec: f"kernel-{spec.name.split()[-1]}")
    monkeypatch.setattr(ahead, "processes", lambda: 2)
    compiling(monkeypatch, lambda name: None)
    return tmp_path


def compiling(monkeypatch: pytest.MonkeyPatch, work: Callable[[str], object]) -> None:
    """Have ``work`` done where a kernel of that name is compiled; then it is in the cache."""

    def compile_spec(spec: KernelSpec, *, launcher: bool) -> str:
        work(spec.name)
        folder = Path(os.environ["TRITON_CACHE_DIR"], spec.name.replace("kernel ", "BINARY"))
        with (folder.with_suffix(".count")).open("a") as file:
            file.write("x")
        folder.mkdir(exist_ok=True)
        return folder.name

    monkeypatch.setattr(ahead, "compile_spec", compile_spec)


def begin() -> Ahead:
    one = Ahead()
    one.begin(CONFIG, TPGroup(), 1)
    return one


def counts(cache: Path) -> dict[str, int]:
    """How often each kernel was compiled."""
    return {file.stem: file.stat().st_size for file in cache.glob("*.count")}


def gone(pid: int) -> bool:
    """Whether a process has ended, and its parent knows it; waits for that."""
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_all_is_compiled_once_and_known_afterwards(cache: Path) -> None:
    begin().wait()
    assert len(counts(cache)) == len(SPECS) and set(counts(cache).values()) == {1}
    again = begin()
    again.wait(pytest.fail)
    assert again.missing is None and set(counts(cache).values()) == {1} and gone(again._pid)


@pytest.mark.parametrize("number", [1, 7, 9])
def test_what_was_deleted_from_the_cache_is_compiled_anew(
    number: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waited for, unless the first kernels are there."""
    begin().wait()
    (cache / f"BINARY{number}").rmdir()
    compiling(monkeypatch, lambda name: time.sleep(0.5))
    again = begin()
    again.wait()
    assert (cache / f"BINARY{number}").is_dir() == (number < ahead._FIRST)
    assert gone(again._pid)
    assert counts(cache) == {f"BINARY{n}": 1 + (n == number) for n in range(len(SPECS))}


def test_another_order_does_not_pass_for_this_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another GPU, code or Triton has another digest; what both have is not compiled again."""
    begin().wait()
    monkeypatch.setattr(FakeOrder.__new__, "__defaults__", ("whole-other",))
    other = begin()
    other.wait()
    assert other.missing == 0 and set(counts(cache).values()) == {1}
    for _ in range(100):
        if (cache / "tpctl-ahead" / "whole-other").exists():
            break
        time.sleep(0.05)
    assert (cache / "tpctl-ahead" / "whole-other").exists()


def test_the_digests_are_of_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels.digest(["a"])
    assert before == kernels.digest(["a"]) != kernels.digest(["b"])
    monkeypatch.setattr(triton, "__version__", "0.0.0")
    assert kernels.digest(["a"]) != before


@pytest.mark.parametrize("what", ["rehearsal", "compiler", "lock"])
def test_what_hangs_is_waited_for_in_bounds_and_then_ended(
    what: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_SILENCE", 0.6)
    said: list[str] = []
    if what == "rehearsal":
        monkeypatch.setattr(ahead, "rehearse", lambda order: time.sleep(1000))
    elif what == "compiler":
        compiling(monkeypatch, lambda name: time.sleep(1000))
    else:
        monkeypatch.setattr(ahead.fcntl, "flock", locked)
    one, started = begin(), time.monotonic()
    one.wait(said.append)
    assert 0.5 < time.monotonic() - started < 10
    assert said[-1] == "compiling kernels as they are met"
    assert gone(one._pid)


def locked(file: object, how: int) -> None:
    raise BlockingIOError


def test_what_goes_on_for_ever_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LONGEST", 1.0)
    compiling(monkeypatch, lambda name: time.sleep(0.4))
    started = time.monotonic()
    begin().wait()
    assert 0.9 < time.monotonic() - started < 10


def test_a_rank_that_waits_for_another_engine_sees_that_it_compiles(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines that start together: one compiles, and the other waits longer than for one that is silent, and says
    nothing of kernels that it has not looked at."""
    monkeypatch.setattr(ahead, "_SILENCE", 1.5)
    compiling(monkeypatch, lambda name: time.sleep(0.5))
    first = begin()
    while not (cache / "tpctl-ahead" / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    second = begin()
    second.wait(pytest.fail)
    assert len(counts(cache)) == len(SPECS) and set(counts(cache).values()) == {1}
    first.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_killed_is_no_reason_to_wait(
    number: signal.Signals, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiling(monkeypatch, lambda name: time.sleep(1000))
    one, started = begin(), time.monotonic()
    time.sleep(0.5)
    os.kill(one._pid, number)
    one.wait()
    assert time.monotonic() - started < 10 and gone(one._pid)
    assert "Traceback" not in capfd.readouterr().err


def test_a_kernel_that_does_not_compile_is_not_tried_at_each_start(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(name: str) -> None:
        if name == "kernel 2":
            raise ValueError("no such instruction")

    compiling(monkeypatch, work)
    begin().wait()
    again = begin()
    again.wait()
    assert again.missing is None and len(counts(cache)) == len(SPECS) - 1


def full() -> None:
    raise OSError(28, "No space left on device")


def out_of_memory() -> None:
    """As Triton runs the assembler."""
    try:
        subprocess.run(["sh", "-c", "kill -9 $$"], check=True)
    except subprocess.CalledProcessError as failed:
        raise PTXASError(f"`ptxas` failed with error code {failed.returncode}")  # noqa: B904


def out_of_memory_in_a_shell() -> None:
    subprocess.run(["sh", "-c", "exit 137"], check=True)


@pytest.mark.parametrize("lacking", [full, out_of_memory, out_of_memory_in_a_shell])
def test_what_there_was_no_room_for_is_tried_again(
    lacking: Callable[[], None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling(monkeypatch, lambda name: lacking())
    begin().wait()
    assert not counts(cache)
    compiling(monkeypatch, lambda name: None)
    begin().wait()
    assert len(counts(cache)) == len(SPECS)


def test_an_assembler_that_crashes_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not was_killed(subprocess.CalledProcessError(255, "ptxas"))
    assert not was_killed(subprocess.CalledProcessError(-signal.SIGSEGV, "ptxas"))
    assert was_killed(subprocess.CalledProcessError(-signal.SIGKILL, "ptxas"))


def test_a_cache_that_cannot_be_written_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (cache / "tpctl-ahead").write_text("no folder")
    begin().wait(pytest.fail)
    err = capfd.readouterr().err
    assert err.startswith("compiling ahead: FileExistsError") and err.count("\n") == 1


def test_a_system_without_room_for_a_process_starts_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(ahead.os, "fork", fork)
    found = worker.Kernels(CONFIG)
    assert found._ahead is None
    found.begin(CONFIG, TPGroup())
    found.wait(TPGroup(), pytest.fail)


@pytest.mark.parametrize(
    "cores, gigabytes, found", [(1, 64, 0), (3, 64, 0), (4, 64, 4), (128, 64, 16), (16, 3, 6), (16, 1, 0)]
)
def test_few_cores_or_little_memory_compile_nothing_ahead(
    cores: int, gigabytes: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "available_cores", lambda: cores)
    monkeypatch.setattr(ahead, "available_host_memory", lambda: gigabytes << 30)
    assert processes() == found


@pytest.mark.parametrize("rank, off, cores, compiles", [
    ("0", "", 8, True), ("1", "", 8, False), ("0", "off", 8, False), ("0", "", 0, False),
])  # fmt: skip
def test_the_first_rank_of_a_host_compiles_unless_it_is_not_to(
    rank: str, off: str, cores: int, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv(worker.AHEAD, off)
    monkeypatch.setattr(ahead, "processes", lambda: cores)
    assert (worker.Kernels(CONFIG)._ahead is not None) == compiles


RANK = """
import os, sys, time
from pathlib import Path
import pytest
import tests.gpu.test_compiling_ahead as it
from tpctl.engine.runners import ahead
patch = pytest.MonkeyPatch()
patch.setattr(ahead, "Order", it.FakeOrder)
patch.setattr(ahead, "rehearse", lambda order: ((spec, True) for spec in it.SPECS))
patch.setattr(ahead, "compile_driver", lambda: None)
patch.setattr(it.Compiled, "digest", lambda self, spec: f"kernel-{spec.name.split()[-1]}")
patch.setattr(ahead, "processes", lambda: 3)
it.compiling(patch, lambda name: (Path(sys.argv[1], f"{os.getpid()}.pid").touch(), time.sleep(1000)))
one = it.begin()
print("begun", flush=True)
if sys.argv[2] == "wait":
    one.wait()
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["wait", "load"])
def test_nothing_outlives_its_rank(number: signal.Signals, when: str, cache: Path) -> None:
    env = {**os.environ, "TPCTL_TEST_MARK": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(cache), when], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert rank.stdout is not None and rank.stdout.readline() == b"begun\n"
        for _ in range(400):
            if len(list(cache.glob("*.pid"))) == 3:
                break
            time.sleep(0.05)
        assert len(list(cache.glob("*.pid"))) == 3
        rank.send_signal(number)
        rank.wait(timeout=20)
    finally:
        rank.kill()
        rank.wait()
    for _ in range(200):
        if not (left := with_variable(f"TPCTL_TEST_MARK={cache}")):
            break
        time.sleep(0.05)
    assert not left


def test_what_is_noted_at_once_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Compiled()
    assert "kernel-0" not in notes
    notes.add("kernel-0", ["there"])
    assert "kernel-0" not in notes, "it is not there"
    (cache / "there").mkdir()
    assert "kernel-0" in notes
    notes.add("whole", ["kernel-0", "kernel-1"])
    assert "whole" not in notes
    notes.add("kernel-1")
    assert "whole" in notes
    (notes.folder / "whole").write_bytes(b"\xff\xfe")
    assert "whole" not in notes


def test_a_kernel_that_another_process_compiled_meanwhile_is_left(cache: Path) -> None:
    compile_one(["tpctl.kernels.common.norm", "kernel 0", "", "", ""], True)
    compile_one(["tpctl.kernels.common.norm", "kernel 0", "", "", ""], True)
    assert counts(cache) == {"BINARY0": 1}
