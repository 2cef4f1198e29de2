"""What runs on a node of a Ray cluster: an actor that keeps one replica, which dies with it. It needs no Ray itself.

    coordinator ── Ray ── Keeper, an actor in its placement group ── Popen ── tpctl replica FOLDER

Lines go the same way as everywhere, through the folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tpctl.batch.local import last_line
from tpctl.children import python_environment
from tpctl.launch.lifeline import PARENT_PID

COMMAND = ("-m", "tpctl", "replica")
"""What the node's own Python runs."""

_SIGHT = "ray"  # a file of the job's folder that holds the run's token: who reads it sees the same folder


def show(root: Path, token: str) -> None:
    """Leave in a batch's folder what its nodes look for.

    Raises:
        OSError: it cannot be written.
    """
    (root / ".job" / _SIGHT).write_text(token)


class Keeper:
    """Starts a replica and waits for its end. Two threads call it: one waits, the other may ask for the end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def run(self, root: str, name: str, token: str, gpus: int, command: Sequence[str] = COMMAND) -> tuple[int, str]:
        """Run replica ``name`` of the batch in ``root`` to its end.

        Args:
            token: of the coordinator's run, which tells its folder from another one with the same path.
            gpus: that the replica has, of which Ray told this actor; 0: a core for each of its ranks.

        Returns:
            Its exit code, and the last line that it said, with the host's name.
        """
        host = os.uname().nodename
        try:
            seen = Path(root, ".job", _SIGHT).read_text()
        except OSError:
            seen = ""
        if seen != token:
            return 1, (
                f"tpctl: {host} does not see the folder {root} of the batch; put it on a disk that every node has "
                "under the same path"
            )
        env = {**python_environment(os.environ), PARENT_PID: str(os.getpid())}
        if gpus:
            env.pop("OMP_NUM_THREADS", None)  # Ray's 1, as this actor takes no CPU
        else:
            env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # of each rank
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, root, "--name", name],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            if self._ended:
                self._process.send_signal(signal.SIGTERM)
            code = self._process.wait()
            said = last_line(log)
        return code, f"{said} (on {host})" if said else ""

    def end(self) -> None:
        """Ask the replica to leave."""
        self._ended = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
