"""``tpctl serve`` as a process, for tests and for scripts that measure it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from tests.processes import with_variable

PATIENCE = 240.0  # seconds that anything may take on a busy machine


class ServerProcess:
    """Started by the constructor; leaving it as a context manager ends it in order.

    Attributes:
        url: known once it is ``ready``.
        said: what it wrote to stderr.
    """

    def __init__(self, *arguments: str, program: Sequence[str] = ("-m", "tpctl", "serve"), **env: str) -> None:
        command = [sys.executable, *program, *arguments, "--port", "0"]
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
        self.url = ""
        self.said: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        self.ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    def ready(self) -> Self:
        assert self._ready.wait(PATIENCE) and self.url, self.said
        return self

    def told(self) -> str:
        """The last line that it wrote to stderr before it ended."""
        self._reader.join(PATIENCE)
        return self.said[-1]

    def workers(self) -> list[int]:
        """Ids of its live workers."""
        return with_variable(f"TPCTL_PARENT_PID={self.process.pid}")

    def counters(self) -> dict[str, float]:
        """What /metrics says."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=PATIENCE).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def memory(self, pid: int | None = None) -> int:
        """Bytes that the server's own process holds, or another one."""
        return int(Path(f"/proc/{pid or self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def processor_seconds(self, pid: int | None = None) -> float:
        fields = Path(f"/proc/{pid or self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))
            if found := re.search(r"Uvicorn running on (http://\S+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()
