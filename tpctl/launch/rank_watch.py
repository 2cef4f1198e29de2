"""The agent's eye on its ranks: each one's end is written down in the moment it comes, in the order they come.

torchrun says how ranks ended once it has ended all of them and itself, which takes seconds, and on a busy machine many;
of several that end between two of its looks it names any. The command line needs only the first of them, and at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

from tpctl.launch.failure import RankFailure, read_error_file, write_report

_PAUSE = 0.01  # seconds


class RankWatch:
    """Notes how forked ranks end, in a report that ``failure.read_report`` reads.

    Made by the agent before it forks; ``announce`` is called in each rank.
    """

    def __init__(self, report: Path, ranks: int) -> None:
        """Listen to so many ranks."""
        self._report = report
        self._ranks = ranks
        self._failures: list[RankFailure] = []
        self._lock = threading.Lock()
        self._from_ranks, self._to_agent = os.pipe()
        self._from_agent, self._to_ranks = os.pipe()
        threading.Thread(target=self._listen, daemon=True, name="tpctl-ranks").start()

    def announce(self) -> None:
        """In a rank: tell the agent which process it is, and wait until all ranks are there.

        What a rank does wakes threads of the agent, as that of the store where ranks meet. While the agent forks the
        next one, they must sleep: a child has a copy of whatever lock they hold, which nobody in it opens (fork(2)).
        One that the store's thread takes when a rank connects is that of the system's resolver (getnameinfo(3)).
        """
        about = [int(os.environ["RANK"]), os.getpid(), os.environ.get("TORCHELASTIC_ERROR_FILE", "")]
        os.write(self._to_agent, json.dumps(about).encode() + b"\n")  # below PIPE_BUF, so never mixed with another's
        os.close(self._to_ranks)  # so that the wait ends with the agent
        os.read(self._from_agent, 1)

    def add(self, failures: list[RankFailure]) -> None:
        """Put ends into the report of which nothing is known yet."""
        with self._lock:
            known = {failure.rank for failure in self._failures}
            new = [failure for failure in failures if failure.rank not in known]
            if new:
                self._failures += new
                write_report(self._report, self._failures)

    def _listen(self) -> None:
        with os.fdopen(self._from_ranks, encoding="utf-8") as lines:
            for line in [next(lines) for _ in range(self._ranks)]:
                rank, pid, error_file = json.loads(line)
                arguments = (rank, pid, Path(error_file))
                threading.Thread(target=self._await_end, args=arguments, daemon=True).start()
            os.write(self._to_ranks, bytes(self._ranks))

    def _await_end(self, rank: int, pid: int, error_file: Path) -> None:
        process = _child(pid)
        code: int | None
        try:
            # WNOWAIT leaves the child to torchrun, whose it is.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        except ChildProcessError:  # torchrun was quicker
            while process is not None and process.exitcode is None:
                time.sleep(_PAUSE)
            code = process.exitcode if process is not None else 0
        if code:
            self.add([RankFailure(rank, code, read_error_file(error_file), time.time())])


def await_sleep(seconds: float = 1.0, tasks: Path = Path("/proc/self/task")) -> None:
    """Until no other thread of this process runs, or wants to, but for so many seconds: before a fork."""
    deadline, own = time.monotonic() + seconds, threading.get_native_id()
    while time.monotonic() < deadline and any(map(_awake, {int(task.name) for task in tasks.iterdir()} - {own})):
        time.sleep(_PAUSE / 10)


def _awake(thread: int) -> bool:
    """As proc(5) has it: R runs or could, D waits for a disk."""
    try:
        return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] in "RD"
    except OSError:
        return False  # it has ended


def _child(pid: int) -> multiprocessing.process.BaseProcess | None:
    """The forked process of this id; ``None`` if it has ended and torchrun has taken note."""
    for _ in range(100):  # the child may be quicker than the call that forked it
        for child in multiprocessing.active_children():
            if child.pid == pid:
                return child
        time.sleep(_PAUSE)
    return None
