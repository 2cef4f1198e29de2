"""Runs a case's commands in this process, each as the console script would, and watches what they do.

A case has a folder of its own, always of the same name: ``work``, where the commands run, and ``home``, ``cache`` and
``tmp``, which the environment names. What Python code opens for writing elsewhere, or renames, removes and makes there,
is seen by an audit hook; connections to other machines are refused by it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, Change, Outcome

MEMORY = 1_000_000_000
"""Bytes that a command may take."""

PYTHON = "!python"
"""A command that is code to run; shows that a fault is seen."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PLACES = {  # audit events, and which of their arguments are names of files that are changed
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}


class Sandbox:
    """The folder of cases, and this process around it.

    Attributes:
        engine: what the last command started an engine with; filled by whatever stands in for one.
    """

    def __init__(self, folder: Path, pristine: Path) -> None:
        """Take this process for cases; it can do nothing else afterwards.

        Args:
            folder: of the case; replaced for every one.
            pristine: a folder for each ``Case.base``, copied into ``work``.
        """
        self._root = folder
        self._pristine = pristine
        self._streams = folder.with_name(f"{folder.name}-streams")
        self._streams.mkdir(exist_ok=True)
        self._outside: list[str] | None = None
        self.engine: dict[str, Any] = {}
        limit = _status("VmSize") + MEMORY + (512 << 20)  # a little more, so that it is seen who comes near
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(self._hook)

    def run(self, case: Case) -> Iterator[Outcome]:
        """Make the case's folder and run its commands up to the first that fails."""
        os.chdir("/")
        _remove(self._root)
        for name in ("home", "cache", "tmp"):
            (self._root / name).mkdir(parents=True)
        shutil.copytree(self._pristine / case.base, self._root / "work", symlinks=True)
        for change in case.changes:
            apply(self._root / "work", change)
        tempfile.tempdir = str(self._root / "tmp")
        os.chdir(self._root / "work")
        for command in case.commands:
            outcome = self._command(command, case.stdin)
            yield outcome
            if outcome.code != 0 or outcome.failure is not None:
                return

    def _command(self, command: tuple[str, ...], stdin: bytes) -> Outcome:
        before = tree(self._root)
        self.engine.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        with _streams(self._streams, stdin):
            begun = time.monotonic()
            self._outside = []
            code, failure, place = _main(command)
            outside, self._outside = tuple(dict.fromkeys(self._outside)), None
            seconds = time.monotonic() - begun
        _end_children()
        peak = _status("VmHWM")
        if (grown := resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) > children:
            peak = max(peak, grown << 10)
        after = tree(self._root)
        notes = ["imported torch"] if sys.modules.pop("torch", None) else []
        return Outcome(
            command,
            code,
            (self._streams / "1").read_bytes().decode("utf-8", "surrogateescape"),
            (self._streams / "2").read_bytes().decode("utf-8", "surrogateescape"),
            failure,
            place,
            seconds,
            peak,
            tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))),
            outside,
            tuple(notes),
            dict(self.engine),
        )

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._outside is None:
            return
        if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in _LOOPBACK:
            raise OSError(101, "Network is unreachable")
        places: tuple[int, ...] = _PLACES.get(event, ())
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            places = (0,)
        for place in places:
            name = arguments[place]
            if not isinstance(name, str | bytes | os.PathLike):
                continue
            try:
                path = os.path.abspath(os.fsdecode(name))  # noqa: PTH100 — resolves no link, and is fast
            except (OSError, ValueError):
                continue
            # The last is where an engine's run folder goes if the temporary folder's name is too long for a socket's.
            if not path.startswith((f"{self._root}/", "/dev/", "/proc/", "/tmp/tpctl-")):
                self._outside.append(f"{event} {path}")
                raise PermissionError(1, "not within the case's folder", path)


def apply(work: Path, change: Change) -> None:
    """Make one change below ``work``."""
    path = work / change.path
    if change.kind in ("cut", "sparse", "flip"):
        if not path.is_file():
            return
        if change.kind == "flip":
            raw = bytearray(path.read_bytes())
            if raw:
                raw[change.size // 8 % len(raw)] ^= 1 << change.size % 8
            path.write_bytes(raw)
        else:
            os.truncate(path, min(change.size, path.stat().st_size) if change.kind == "cut" else change.size)
        return
    if change.kind == "unreadable":
        if path.exists():
            path.chmod(0)
        return
    _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if change.kind == "write":
        path.write_bytes(change.content)
    elif change.kind == "folder":
        path.mkdir()
    elif change.kind == "fifo":
        os.mkfifo(path)
    elif change.kind in ("loop", "dangling", "zero"):
        path.symlink_to({"loop": path.name, "dangling": "nothing-here", "zero": "/dev/zero"}[change.kind])


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below ``root`` with what tells whether it changed."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)  # noqa: PTH118 — thousands of times a second
            info = os.lstat(path)
            what: tuple[Any, ...] = (info.st_ino, info.st_mode)
            if not stat.S_ISDIR(info.st_mode):
                what += (info.st_size, info.st_mtime_ns)
            found[os.path.relpath(path, root)] = what
    return found


def _main(command: tuple[str, ...]) -> tuple[int | None, str | None, str]:
    """Run tpctl's own ``main``: the exit code, or what nobody caught and where it came from."""
    from tpctl.cli.app import main

    sys.argv = ["tpctl", *command]
    try:
        if command[0] == PYTHON:
            exec(command[1])
        else:
            main()
    except SystemExit as ended:
        return (ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1), None, ""
    except BaseException as error:  # a PanicException of Rust's is no Exception
        return None, f"{type(error).__name__}: {str(error)[:300]}", _place(error)
    return 0, None, ""


def _place(error: BaseException) -> str:
    """The innermost line of tpctl that ``error`` came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tpctl/" in frame.filename]
    if not frames:
        return ""
    return f"{frames[-1].filename.rpartition('/tpctl/')[2]}:{frames[-1].name}"


@contextmanager
def _streams(folder: Path, stdin: bytes) -> Iterator[None]:
    """Numbers 0, 1 and 2 are files, and Python's streams are fresh ones on them."""
    (folder / "0").write_bytes(stdin)
    kept = sys.stdin, sys.stdout, sys.stderr
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDWR), (2, os.O_RDWR)):
        opened = os.open(folder / str(number), mode | (os.O_CREAT | os.O_TRUNC if number else 0), 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = kept


def _end_children() -> None:
    """End what ends by itself where a command is a process: it waits on a pipe that would close with that."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


def _remove(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path, onerror=lambda function, name, error: (os.chmod(name, 0o700), function(name)))  # noqa: PTH101


def _status(name: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
