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

    def __init__(self, report: Path) -> None:
        self._report = report
        self._failures: list[RankFailure] = []
        self._lock = threading.Lock()
        self._from_ranks, self._to_agent = os.pipe()
        threading.Thread(target=self._listen, daemon=True, name="tpctl-ranks").start()

    def announce(self) -> None:
        """In a rank: tell the agent which process it is."""
        about = [int(os.environ["RANK"]), os.getpid(), os.environ.get("TORCHELASTIC_ERROR_FILE", "")]
        os.write(self._to_agent, json.dumps(about).encode() + b"\n")  # below PIPE_BUF, so never mixed with another's

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
            for line in lines:
                rank, pid, error_file = json.loads(line)
                arguments = (rank, pid, Path(error_file))
                threading.Thread(target=self._await_end, args=arguments, daemon=True).start()

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


def _child(pid: int) -> multiprocessing.process.BaseProcess | None:
    """The forked process of this id; ``None`` if it has ended and torchrun has taken note."""
    for _ in range(100):  # the child may be quicker than the call that forked it
        for child in multiprocessing.active_children():
            if child.pid == pid:
                return child
        time.sleep(_PAUSE)
    return None
