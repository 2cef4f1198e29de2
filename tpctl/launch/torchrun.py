"""Start, watch and stop the workers of one engine.

    command line ── Workers ─┬─ tp 1:  python -m tpctl.engine.worker        (rank 0)
         │                   └─ tp N:  torchrun (launch.agent) ─┬─ rank 0           forked
         │                                                      └─ …  rank N-1
         └────────────── Unix socket in a private folder ────────── rank 0

One rank needs no rendezvous, so it is started directly with the environment torchrun would give it, which
saves the seconds that the agent takes to import torch. The worker sees no difference.
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

from tpctl.children import python_environment
from tpctl.engine.config import EngineConfig
from tpctl.errors import EngineError, TpctlError
from tpctl.launch.bytecode import bytecode_environment
from tpctl.launch.channel import Channel
from tpctl.launch.failure import RankFailure, explain, read_error_file, read_report, root_cause, signal_name
from tpctl.launch.lifeline import PARENT_PID
from tpctl.launch.processes import MARK, kill_marked
from tpctl.launch.run_folder import RunFolder

WORKER = "tpctl.engine.worker"
# glibc returns large freed blocks to the kernel at once and takes them back, page by page and zeroed, at the next call.
# On a CPU that cost a layer's activations more than the arithmetic on them. 32 MiB is the largest value it accepts.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt): ")


class Workers:
    """The processes of one engine: started by the constructor, ended by ``close`` at the latest.

    The folder of their logs outlives ``close`` only if an error named it.
    """

    def __init__(self, config: EngineConfig, module: str = WORKER, env: Mapping[str, str] | None = None) -> None:
        """Start the workers; returns at once.

        Args:
            module: the Python module whose ``main()`` every rank runs.
            env: variables for the workers beside this process's own.

        Raises:
            EngineError: the interpreter could not be started, or there is no place for temporary files.
        """
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
        command, variables = self._command(module), self._environment(env or {})
        # The kernel ties a child to the thread that started it, so this thread stays as long as the child.
        threading.Thread(target=self._run, args=(command, variables, started), daemon=True).start()
        started.wait()
        if self._start_error is not None:
            self.close()
            raise EngineError(f"the workers could not be started: {self._start_error}")

    @property
    def exited(self) -> bool:
        return self._exited.is_set()

    def accept(self, timeout: float) -> Channel | None:
        """Wait for rank 0 to connect: its channel; ``None`` after ``timeout`` s or once the workers end."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            gone = self.exited
            try:
                readable, _, _ = select.select([self._listener], [], [], 0 if gone else min(left, 0.1))
                if readable:
                    return Channel(self._listener.accept()[0])
            except (OSError, ValueError):  # closed by another thread
                return None
            if gone:
                return None
        return None

    def failure(self, reported: str | None = None, patience: float = 10.0) -> TpctlError:
        """Why the workers ended. Call it when rank 0 hung up or said ``Fatal``; it ends what is left.

        Args:
            reported: what rank 0 said of it; used where the ranks left no record.
            patience: seconds to let torchrun notice, end the other ranks and write its report.
        """
        if not self._exited.wait(patience):
            self._end(polite=2.0)
        failures = self._failures()
        cause = root_cause(failures)
        error: TpctlError
        if cause is None:
            error = EngineError(reported or self._unexplained())
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
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", self._folder.name),
            *("--local-addr", "127.0.0.1", "--max-restarts", "0"),
            *("--nproc-per-node", str(self._tp_size), "--log-dir", str(self._logs), "--redirects", "3"),
            *worker,
        ]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        threads = str(max(1, _cores() // self._tp_size))
        defaults = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **_KEEP_FREED_MEMORY}
        env = python_environment({**defaults, **os.environ, **more})
        env |= bytecode_environment(env)
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: do not depend on what its name resolves to
        env |= {PARENT_PID: str(os.getpid()), MARK: str(self._folder)}
        if self._tp_size == 1:
            # Port 0 lets the store choose; nobody else has to find it.
            env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            env |= {"TORCHELASTIC_ERROR_FILE": str(self._folder / "error.json")}
        return env

    def _failures(self) -> list[RankFailure]:
        if self._tp_size > 1:
            return read_report(self._folder / "report.json")
        code = self._process.returncode if self._process is not None else None
        return [RankFailure(0, code, read_error_file(self._folder / "error.json"))] if code else []

    def _unexplained(self) -> str:
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            return f"the launcher was ended by {signal_name(-code)}, and the workers with it"
        tail = _last_line(self._logs / "launcher.log")
        said = f": {tail}" if tail and code else " without saying why"
        return f"the workers ended (exit code {code}){said}; their output is in {self._logs}"

    def _rank_log(self, rank: int) -> Path:
        if self._tp_size == 1:
            return self._logs / "launcher.log"
        # torchrun's layout: <its own run id>/attempt_0/<rank>/stderr.log
        return next(self._logs.glob(f"*/attempt_0/{rank}/stderr.log"), self._logs / "launcher.log")

    def _end(self, polite: float) -> None:
        process = self._process
        if process is not None and not self.exited:
            process.send_signal(signal.SIGTERM)  # torchrun passes it on to its workers
            if not self._exited.wait(polite):
                process.kill()
                self._exited.wait(5)
        kill_marked(str(self._folder), timeout=5)


def _cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores this process may use: its affinity, and in a container its quota (cgroup v2's ``cpu.max``)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return count


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
