"""A virtual environment for a program, and the server that it talks to."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.server_process import PATIENCE, ServerProcess

SETTINGS = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory", "512MiB")

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--venvs", type=Path, help="a folder in which the environments are kept")


class Client:
    """A program of others.

    Attributes:
        folder: is empty at first, and its home.
        python: the interpreter that has it.
    """

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = python

    def run(self, *command: str | Path, fails: bool = False, **env: str) -> str:
        """What a command writes to stdout; a name without a folder is looked for beside the interpreter.

        Raises:
            SystemExit: it failed, or with ``fails`` it did not.
        """
        program = self.python.parent / command[0]
        own = {"HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "NO_COLOR": "1", **env}
        done = subprocess.run(
            [str(program if program.exists() else command[0]), *map(str, command[1:])],
            cwd=self.folder,
            env={**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE * 4,
        )
        if (done.returncode != 0) is not fails:
            raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def installed(*packages: str, beside: bool = False) -> Iterator[Client]:
    """An environment with packages, in the folder that ``--venvs`` names or a temporary one.

    Args:
        beside: what this interpreter has can be imported there, too, torch above all; else nothing else is there.
    """
    kept = PARSER.parse_args().venvs
    with tempfile.TemporaryDirectory(prefix="tpctl-clients-") as name:
        temporary = Path(name).resolve()
        home = (kept or temporary / "venvs").resolve() / Path(sys.argv[0]).stem
        python = home / "bin" / "python"
        if not python.exists():
            venv.create(home)
            (packages_folder,) = home.glob("lib/python*/site-packages")
            if beside:
                ours = [one for one in sys.path if Path(one).name == "site-packages"]
                (packages_folder / "beside.pth").write_text("\n".join([*ours, str(Path(__file__).parents[2])]) + "\n")
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", *packages], check=True)
        folder = temporary / "home"
        folder.mkdir()
        print("installed", *packages, flush=True)
        yield Client(folder, python)


@contextmanager
def serving(model: str = "demo", *options: str, **env: str) -> Iterator[ServerProcess]:
    """A server of the demo model, in float32, that must have failed at nothing in the end."""
    server = ServerProcess(model, *SETTINGS, "--served-model-name", "demo", *options, **env)
    with server:
        yield server
        answers = answered(server)
        print("answered:", *(f"{path} {status}: {count:.0f}," for (path, status), count in answers.items()))
    broken = [line for line in server.said if "Traceback" in line or "failed" in line]
    expect(not broken and all(status < 500 for _, status in answers), "the server fails at nothing", *broken)


def answered(server: ServerProcess) -> dict[tuple[str, int], float]:
    """How many answers there were by path and status, but for those of paths that scripts look at themselves."""
    found = {}
    for name, count in server.counters().items():
        if name.startswith("tpctl_http_requests_total{"):
            _, path, _, status, _ = name.split('"')
            if path not in ("/health", "/metrics"):
                found[path, int(status)] = count
    return found


def expect(right: bool, what: str, *found: object) -> None:
    """Say what holds, or end where it does not."""
    print("ok:" if right else "WRONG:", what, *(() if right else found), flush=True)
    if not right:
        raise SystemExit(1)


def refuses(server: ServerProcess, *paths: str) -> None:
    """Nothing was refused but at ``paths``."""
    bad = {key: count for key, count in answered(server).items() if key[1] >= 400 and key[0] not in paths}
    expect(not bad, "nothing is refused", bad)
