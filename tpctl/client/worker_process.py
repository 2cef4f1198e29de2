"""The command's end of processes that do what no thread could be told to stop: `template_worker`, `grammar_worker`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tpctl.children import python_environment
from tpctl.client.template_worker import frame, receive


def start(module: str) -> subprocess.Popen[bytes]:
    """``python -m module``. Raises ``OSError``."""
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=python_environment(os.environ),
        start_new_session=True,  # Ctrl-C at the terminal is for the command
    )


def exchange(process: subprocess.Popen[bytes], request: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
    """The process' answer; ``None``: it has ended, or says nothing for so long."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(frame(request))
        process.stdin.flush()
        if select.select([process.stdout], [], [], seconds)[0]:
            return receive(process.stdout)
    return None


def close(process: subprocess.Popen[bytes]) -> None:
    """End a process. May be called again."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # what it was not told any more stands in the buffer
                stream.close()


def how(code: int) -> str:
    """A process ended so."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
