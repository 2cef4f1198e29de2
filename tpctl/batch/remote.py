"""Replicas on other hosts: for each a process of this host (srun, ssh) stands, and ends when the replica does.

    coordinator ── Popen ── srun or ssh ── network ── tpctl replica FOLDER --tied
         └────────────── its stdin, a pipe ──────────────┘

The pipe is the tie. Nothing is ever written to it; when the coordinator closes it, or is killed, the replica reads its
end and leaves. Lines go the same way as everywhere, through the folder.
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import IO

from tpctl.batch.local import INTERRUPTED, Local, Slot, last_line

_SIGNALS = {129: "SIGHUP", 130: "SIGINT", 134: "SIGABRT", 135: "SIGBUS", 137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM"}


@dataclass
class Remote(Local, ABC):
    """What launchers to other hosts have in common. What ends a replica there ends no batch: others may do better."""

    noise: tuple[str, ...] = ()
    """Beginnings of lines that the launching program adds to what the replica says."""

    @abstractmethod
    def _argv(self, slot: Slot) -> list[str]:
        """The command that starts the replica of a slot and waits for its end."""

    def _environment(self) -> dict[str, str]:
        """The launching program's own."""
        return dict(os.environ)

    def _launch(self, slot: Slot, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._argv(slot),
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def _ask_to_end(self, process: subprocess.Popen[bytes]) -> None:
        """By the end of its stdin, which reaches the replica; a signal would reach srun or ssh alone."""
        assert process.stdin is not None
        process.stdin.close()

    def _judge(self, slot: Slot, code: int) -> tuple[str, bool, bool]:
        said = last_line(slot.log, self.noise)
        ours = said.startswith("tpctl: ") and said != INTERRUPTED
        reason = said.removeprefix("tpctl: ")
        if not ours and abs(code) + 128 * (code < 0) in _SIGNALS:
            reason = f"was killed ({_SIGNALS[abs(code) + 128 * (code < 0)]})"
        return reason or f"ended with exit code {code}", False, ours and code in (1, 2)
