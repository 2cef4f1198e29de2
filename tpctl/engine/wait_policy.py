"""How long threads and ranks spin for what they wait for: long while cores are free, not at all when they are not.

GCC's OpenMP runtime (libgomp, which torch's Linux builds bring) lets a thread that has nothing to do spin for some
milliseconds before it sleeps. On a free core that saves a wake-up per operator. Where another process wants the core,
spinning uses up the time slice in which the thread it waits for should run: a step then takes ten to fifty times as
long. ``OMP_WAIT_POLICY=passive`` avoids that, and costs a quarter of the speed on a quiet machine.

The time cannot be set while a process runs, but "if there are more OpenMP threads than available CPUs, 1000 and 100
spins are used" (GNU libgomp manual, ``GOMP_SPINCOUNT``; 100 where no policy is set). So a thread that keeps a team of
idle threads makes all others of the process spin for a microsecond, and its end makes them spin as before. Ranks that
wait for each other (``shared_memory``) are told. No result depends on it: the number of threads that share an operator
stays.

Whether cores are wanted is read from the time that this process's threads have been ready to run and did not
(``/proc/.../schedstat``, Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tpctl.cores import affinity_cores

_SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_LOOK = 0.1  # seconds between looks at the waiting time, while there is work
# Seconds waited for a core in a second, summed over the threads, from which cores count as wanted. On two cores about
# 0.1 with nothing else running; beside one spinning process 1.0 for threads that spin, 0.4 for threads that do not.
_CROWDED = 0.25
_QUIET = 0.25  # seconds without waiting before threads spin, at first; doubles with every relapse
_LONGEST_QUIET = 4.0  # seconds; after so many of spinning without a relapse the next one counts as the first
_WATCHED = 8  # threads whose waiting is read; more would tell the same
_MOST_IDLE = 16  # threads of the idle team; where more cores than that are to spare, nobody fights for one
_OTHER_RUNTIMES = re.compile(r"/lib(iomp5|omp)\b[^/]*\.so")
_LIBGOMP = re.compile(r"/\S*/libgomp[^/\s]*\.so[^/\s]*")


class SpinJudge:
    """From the waiting time of each look to whether threads may spin. Starts with no."""

    def __init__(self) -> None:
        self.spin = False
        self._quiet = 0.0
        self._needed = _QUIET

    def look(self, waited: float, elapsed: float) -> bool:
        """Whether to spin from now on.

        Args:
            waited: seconds that threads were ready and had no core, since the last look.
            elapsed: seconds since the last look.
        """
        if waited > _CROWDED * elapsed:
            if self.spin:
                self._needed = min(2 * self._needed, _LONGEST_QUIET)
            self.spin, self._quiet = False, 0.0
        else:
            self._quiet += elapsed
            self.spin = self._quiet >= self._needed
            if self._quiet >= self._needed + _LONGEST_QUIET:
                self._needed = _QUIET
        return self.spin


class WaitPolicy:
    """Watches this process while it works, and has its threads spin or not."""

    def __init__(self, team: IdleTeam | None, tell: Callable[[bool], None] | None) -> None:
        self._team = team
        self._tell = tell
        self._working = threading.Event()
        self._working.set()
        self._apply(False)
        threading.Thread(target=self._watch, daemon=True, name="tpctl-spin").start()

    def work(self) -> None:
        """A step may follow."""
        self._working.set()

    def rest(self) -> None:
        """Nothing to do until ``work``: nothing is watched meanwhile."""
        self._working.clear()

    def _watch(self) -> None:
        judge = SpinJudge()
        while True:
            self._working.wait()
            waited, started = waiting_time(), time.monotonic()
            time.sleep(_LOOK)
            self._apply(judge.look(waiting_time() - waited, time.monotonic() - started))

    def _apply(self, spin: bool) -> None:
        if self._team is not None:
            self._team.release() if spin else self._team.hold()
        if self._tell is not None:
            self._tell(spin)


class IdleTeam:
    """Idle OpenMP threads that exist while they are held. One thread may call the methods.

    Args:
        size: threads of the team; one of them is no thread that OpenMP counts.
    """

    def __init__(self, libgomp: ctypes.CDLL, size: int) -> None:
        self._libgomp = libgomp
        self._size = size
        self._release: threading.Event | None = None

    def hold(self) -> None:
        if self._release is None:
            self._release = threading.Event()
            threading.Thread(target=self._keep, args=(self._release,), daemon=True, name="tpctl-idle-team").start()

    def release(self) -> None:
        if self._release is not None:
            self._release.set()
            self._release = None

    def _keep(self, release: threading.Event) -> None:
        # A parallel region that does nothing: any function of one ignored argument will do. Its threads are kept for
        # the next region until the thread that started it ends.
        nothing = ctypes.cast(self._libgomp.omp_get_thread_num, ctypes.c_void_p)
        self._libgomp.GOMP_parallel(nothing, None, ctypes.c_uint(self._size), ctypes.c_uint(0))
        release.wait()


def watch_waiting(threads: int, tell: Callable[[bool], None] | None = None) -> WaitPolicy | None:
    """Start watching, for a process whose operators run on ``threads`` threads.

    Args:
        tell: called with whether other waiting, too, may spin: first with no.

    Returns:
        ``None`` where there is nothing to decide, or the kernel does not say how long threads wait.
    """
    team = _idle_team(threads)
    if (team is None and tell is None) or not waiting_time():
        return None
    return WaitPolicy(team, tell)


def _idle_team(threads: int) -> IdleTeam | None:
    """One that makes more OpenMP threads than cores of ``threads``; ``None`` for one thread, for a user who has decided
    (``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT``), with another OpenMP runtime, or where there are cores to spare."""
    if threads < 2 or any(os.environ.get(name) for name in _SET_BY_USER):
        return None
    libgomp = _libgomp()
    if libgomp is None:
        return None
    size = affinity_cores() - threads + 2
    return IdleTeam(libgomp, size) if 2 <= size <= _MOST_IDLE else None


def waiting_time(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds that the process's first other threads have been ready to run without a core; 0 where the kernel does not
    say."""
    total = 0
    ids = sorted(int(task.name) for task in tasks.iterdir()) if tasks.is_dir() else []
    own = threading.get_native_id()  # who only looks does no work that could be late
    for task in [tasks / str(number) for number in ids if number != own][:_WATCHED]:
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel has no such file
            continue
    return total / 1e9


def _libgomp() -> ctypes.CDLL | None:
    """The runtime that this process has loaded, if it is GCC's and there is one."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = set(_LIBGOMP.findall(mapped))
    if len(paths) != 1 or _OTHER_RUNTIMES.search(mapped):
        return None
    try:
        library = ctypes.CDLL(paths.pop())
        library.GOMP_parallel.restype = None
        return library if hasattr(library, "omp_get_thread_num") else None
    except (OSError, AttributeError):
        return None
