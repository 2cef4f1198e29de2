"""``tpctl`` as a process of its own that has nothing to import: forked from one that has done so, and nothing else.

A command that asks a Hub takes 0.7 s of a processor before it does so, and 0.05 s here. Only for commands that import
neither torch nor transformers, which is asserted.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_IMPORTED = (
    *("huggingface_hub.file_download", "huggingface_hub.hf_api", "typer._adapters"),
    *("tpctl.checkpoint.upload", "tpctl.cli.app", "tpctl.start"),
)


class Forks:
    """Starts commands, one after the other."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(
        self, arguments: Iterable[str], env: Mapping[str, str] = os.environ, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``tpctl`` with ``arguments`` in ``cwd`` (here) and with no other environment than ``env`` (this)."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            asked = {
                "arguments": list(arguments),
                "env": dict(env),
                "cwd": str(cwd or Path.cwd()),
                "out": str(out),
                "err": str(err),
            }
            print(json.dumps(asked), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(asked["arguments"], code, out.read_text(), err.read_text())


@contextmanager
def forks() -> Iterator[Forks]:
    command = [sys.executable, "-m", "tests.forked"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        yield Forks(server)
        server.stdin.close()


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    for line in os.fdopen(os.dup(0)):  # the commands' own standard input is to be one of which nobody has read
        assert threading.active_count() == 1
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            _command(asked)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _command(asked: dict) -> NoReturn:
    """As ``python -m tpctl`` would begin, go and end."""
    for number, (name, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (asked["out"], os.O_WRONLY | os.O_CREAT), (asked["err"], os.O_WRONLY | os.O_CREAT))
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    importlib.reload(importlib.import_module("huggingface_hub.constants"))  # it reads the environment, and only once
    sys.argv = ["tpctl", *asked["arguments"]]
    code: object = 0
    try:
        importlib.import_module("tpctl.start").main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if heavy := {"torch", "transformers"} & sys.modules.keys():
        print(f"heavy imports: {heavy}", file=sys.stderr)
        code = 99
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
