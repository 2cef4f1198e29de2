"""Start, watch and stop the workers of one engine.

    command line ── Workers ─┬─ tp 1:  python -m tpctl.engine.worker        (rank 0)
         │                   └─ tp N:  torchrun (launch.agent) ─┬─ rank 0           forked
         │                                                      └─ …  rank N-1
         └────────────── Unix socket in a private folder ────────── rank 0

One rank needs no rendezvous, so it is started directly with the environment torchrun would give it, which
saves the seconds that the agent takes to import torch. The worker sees no difference. Ranks on other hosts are started
by the same command there (``launch.nodes``).
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tpctl.errors import EngineError, TpctlError
from tpctl.launch.environment import worker_environment
from tpctl.launch.failure import (
    RankFailure,
    explain,
    is_sure,
    read_error_file,
    read_report,
    root_cause,
    signal_name,
    was_asked_to_end,
)
from tpctl.launch.loopback import require_loopback
from tpctl.launch.nodes import ONE_HOST, Nodes
from tpctl.launch.processes import kill_marked
from tpctl.launch.run_folder import RunFolder
from tpctl.wire.channel import Channel
from tpctl.wire.settings import EngineConfig

WORKER = "tpctl.engine.worker"
WORKER_VARIABLE = "TPCTL_WORKER"
"""Names the module that ranks run, where it is not the engine's: for tests of everything around it."""
_LOOK = 0.05  # seconds
_PATIENCE = 10.0  # seconds for a better reason, once a rank's end is known that may be the consequence of another's
_FROZEN = 120.0  # seconds without any sign from a launcher whose rank 0 hung up; torchrun itself gives ranks 30 to end
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt): ")


class Workers:
    """The processes of one engine: started by the constructor, ended by ``close`` at the latest.

    The folder of their logs outlives ``close`` only if an error named it.
    """

    def __init__(
        self,
        config: EngineConfig,
        module: str = WORKER,
        env: Mapping[str, str] | None = None,
        nodes: Nodes = ONE_HOST,
    ) -> None:
        """Start the workers; returns at once.

        Args:
            module: the Python module whose ``main()`` every rank runs.
            env: variables for the workers beside this process's own.
            nodes: hosts that the ranks are on, and which this one is.

        Raises:
            EngineError: the interpreter could not be started, there is no place for temporary files, or ranks could
                not reach each other.
            UsageError: the hosts would not have equally many ranks.
        """
        self._nodes = nodes
        self._ranks = nodes.ranks_here(config.tp_size)
        if nodes.count > 1:
            nodes.check_endpoint()
        elif config.tp_size > 1:
            require_loopback()
        self._tp_size = config.tp_size
        self._keep_folder = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._prepare(config)
        except OSError as error:
            self._listener.close()
            why = error.strerror or error
            raise EngineError(
                f"the workers' temporary folder cannot be made: {why}; set TMPDIR to a folder with free space"
            ) from None
        self._exited = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._start_error: OSError | None = None
        started = threading.Event()
        command = self._command(module)
        variables = worker_environment(os.environ, env or {}, self._tp_size, self._folder, nodes)
        # The kernel ties a child to the thread that started it, so this thread stays as long as the child.
        threading.Thread(target=self._run, args=(command, variables, started), daemon=True).start()
        started.wait()
        if self._start_error is not None:
            self.close()
            raise EngineError(f"the workers could not be started: {self._start_error}")

    @property
    def exited(self) -> bool:
        return self._exited.is_set()

    @property
    def failed(self) -> bool:
        """Whether a rank has ended in a failure, or all of them in any way."""
        return self.exited or bool(self._failures())

    def wait(self) -> None:
        """Until the ranks of this host have ended, as those of the first told them to.

        Raises:
            TpctlError: they failed, or another host did.
        """
        while not self.failed:
            self._exited.wait(_LOOK)
        if self._failures() or self._process is None or self._process.returncode:
            raise self.failure()

    def accept(self, timeout: float) -> Channel | None:
        """Wait for rank 0 to connect: its channel; ``None`` after ``timeout`` s or once a rank has failed."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            gone = self.failed
            try:
                readable, _, _ = select.select([self._listener], [], [], 0 if gone else min(left, 0.1))
                if readable:
                    return Channel(self._listener.accept()[0])
            except (OSError, ValueError):  # closed by another thread
                return None
            if gone:
                return None
        return None

    def failure(self, reported: str | None = None) -> TpctlError:
        """Why the workers ended. Call it when rank 0 hung up or said ``Fatal``; it ends what is left.

        It waits for the reason, and not for a time: a busy machine may take long to end a process and to say so.

        Args:
            reported: what rank 0 said of it; used where the ranks left no record.
        """
        self._await_reason(reported is not None)
        exited = self.exited
        self._end(polite=1.0)
        failures = self._failures()
        cause = root_cause(failures)
        error: TpctlError
        if exited and (cause is None or was_asked_to_end(cause)) and (number := self._launcher_signal()):
            error = EngineError(f"the launcher was ended by {signal_name(number)}, and the workers with it")
        elif cause is None:
            error = EngineError(reported or self._unexplained(exited))
        elif reported is not None and cause.rank == 0 and cause.message is None and cause.exit_code > 0:
            error = EngineError(reported)
        else:
            error = explain(cause, _last_line(self._rank_log(cause.rank)), self._logs)
        self._keep_folder |= str(self._logs) in str(error)
        return error

    def late(self, timeout: float) -> EngineError:
        """The error for workers that run but did not get ready within ``timeout`` seconds."""
        self._keep_folder = True
        return EngineError(f"the workers were not ready after {timeout:g} s; their output is in {self._logs}")

    def close(self, polite: float = 0.0) -> None:
        """End every process of the engine and remove its folder. May be called again.

        Args:
            polite: seconds to wait for the processes to end by themselves (after a ``Stop``) before signals
                are sent.
        """
        self._exited.wait(polite)
        self._end(polite=2.0)
        self._listener.close()
        if self._keep_folder:
            self._run_folder.keep()
        else:
            self._run_folder.remove()

    def _prepare(self, config: EngineConfig) -> None:
        self._run_folder = RunFolder()
        self._folder = self._run_folder.path
        self._logs = self._folder / "logs"
        try:
            self._logs.mkdir()
            self._listener.bind(str(self._folder / "socket"))
            self._listener.listen(1)
            config.save(self._folder / "config.json")
        except OSError:
            self._run_folder.remove()
            raise

    def _run(self, command: list[str], env: dict[str, str], started: threading.Event) -> None:
        try:
            with (self._logs / "launcher.log").open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,  # ranks that inherit it steal the prompt's lines
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C at the terminal is the command line's to handle
                )
        except OSError as error:
            self._start_error = error
        finally:
            if self._process is None:
                self._exited.set()
            started.set()
        if self._process is not None:
            self._process.wait()
            self._exited.set()

    def _command(self, module: str) -> list[str]:
        worker = [module, "--config", str(self._folder / "config.json"), "--socket", str(self._folder / "socket")]
        if self._tp_size == 1:
            return [sys.executable, "-m", *worker]
        return [
            *(sys.executable, "-m", "tpctl.launch.agent", str(self._folder / "report.json")),
            *self._rendezvous(),
            *("--max-restarts", "0"),
            *("--nproc-per-node", str(len(self._ranks)), "--log-dir", str(self._logs), "--redirects", "3"),
            *worker,
        ]

    def _rendezvous(self) -> list[str]:
        """torchrun's options for where its agents meet. "static" gives each host the ranks that it was told to have."""
        if self._nodes.count == 1:
            options = ("c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", self._folder.name)
            return ["--rdzv-backend", *options, "--local-addr", "127.0.0.1"]
        place = ("--nnodes", str(self._nodes.count), "--node-rank", str(self._nodes.rank))
        return ["--rdzv-backend", "static", "--rdzv-endpoint", self._nodes.endpoint, *place]

    def _await_reason(self, reported: bool) -> None:
        """Until it is known why the workers end, or nothing more will be known."""
        started = time.monotonic()
        patient_until = started + (_PATIENCE if reported else _FROZEN)
        hinted = False
        while not self._exited.wait(_LOOK) and time.monotonic() < patient_until:
            failures = self._failures()
            cause = root_cause(failures)
            if cause is None:
                continue
            if is_sure(cause) or (len(failures) == len(self._ranks) and not was_asked_to_end(cause)):
                return
            if not hinted:
                hinted, patient_until = True, time.monotonic() + _PATIENCE

    def _failures(self) -> list[RankFailure]:
        if self._tp_size > 1:
            return read_report(self._folder / "report.json")
        code = self._process.returncode if self._process is not None else None
        return [RankFailure(0, code, read_error_file(self._folder / "error.json"))] if code else []

    def _launcher_signal(self) -> int:
        """The signal that ended the process started here; 0 if none did. The agent reports one as shells do."""
        code = self._process.returncode if self._process is not None else None
        if code is None or self._tp_size == 1:
            return 0
        return -code if code < 0 else max(0, code - 128)

    def _unexplained(self, exited: bool) -> str:
        if not exited:
            return f"rank 0 hung up, and its launcher said nothing of it; the workers' output is in {self._logs}"
        code = self._process.returncode if self._process is not None else None
        tail = _last_line(self._logs / "launcher.log")
        said = f": {tail}" if tail and code else " without saying why"
        return f"the workers ended (exit code {code}){said}; their output is in {self._logs}"

    def _rank_log(self, rank: int) -> Path:
        if self._tp_size == 1:
            return self._logs / "launcher.log"
        # torchrun's layout: <its own run id>/attempt_0/<rank on this host>/stderr.log
        own = rank - self._ranks.start
        return next(self._logs.glob(f"*/attempt_0/{own}/stderr.log"), self._logs / "launcher.log")

    def _end(self, polite: float) -> None:
        process = self._process
        if process is not None and not self.exited:
            process.send_signal(signal.SIGTERM)  # torchrun passes it on to its workers
            if not self._exited.wait(polite):
                process.kill()
                self._exited.wait(5)
        kill_marked(str(self._folder), timeout=5)


def _last_line(log: Path, window: int = 8192) -> str | None:
    """The last exception named in a file's last ``window`` bytes, else the last line with text."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - window))
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()]
    except OSError:
        return None
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return next((line for line in reversed(exceptions or lines) if line), None)
