"""Commands on the GPUs of one machine, as many at once as there are GPUs: for time on a machine that is lent.

    python benchmarks/in_turns.py ROWS [--gpus 2] [--limit 580] [--logs FOLDER]

A line of ROWS is ``GPUS | SECONDS | NAME | COMMAND``. GPUS is 1, for whichever GPU is free next, or 2 and more, for so
many at once, which are waited for; SECONDS is the longest that the command may take, and ``--limit`` the end of all.
Lines are begun in their order; one that less than 20 of its seconds would be left for is not begun, and named. Each
command's output goes to a file of its own in FOLDER, and its end is printed when it is over: with its exit code, or
``killed`` where its time was up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from process_tree import kill_all

_LEAST = 20.0  # seconds, or as many as a row asks for, that are worth beginning
_TOLD = 2500  # characters of an output's end that are printed


@dataclass(frozen=True)
class Row:
    gpus: int
    seconds: float
    name: str
    command: str

    @classmethod
    def parse(cls, line: str) -> Row:
        try:
            gpus, seconds, name, command = (part.strip() for part in line.split("|", 3))
            return cls(int(gpus), float(seconds), name, command)
        except ValueError:
            raise SystemExit(f"{line!r} is not GPUS | SECONDS | NAME | COMMAND") from None


class Gpus:
    """Those of the machine, given to whoever asked first."""

    def __init__(self, count: int) -> None:
        self._free = set(range(count))
        self._changed = threading.Condition()

    def take(self, count: int) -> list[int]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            taken = sorted(self._free)[:count]
            self._free -= set(taken)
            return taken

    def give(self, taken: list[int]) -> None:
        with self._changed:
            self._free |= set(taken)
            self._changed.notify()


def run(row: Row, taken: list[int], ends: float, logs: Path) -> None:
    """Run a row on these GPUs, until ``ends`` (of ``time.monotonic``) at most, and print how it ended."""
    log, began = logs / f"{row.name}.log", time.monotonic()
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, taken)), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        command = subprocess.Popen(
            ["bash", "-c", row.command], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = str(command.wait(max(0.0, min(row.seconds, ends - began))))
        except subprocess.TimeoutExpired:
            code = "killed"
            kill_all(command.pid)
            command.wait()
    said = log.read_text(errors="replace").strip()[-_TOLD:]
    print(f"#### {row.name}: {code} after {time.monotonic() - began:.0f} s on GPU {taken}\n{said}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=580.0)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    lines = (line for line in args.rows.read_text().splitlines() if line.strip() and not line.startswith("#"))
    rows = [Row.parse(line) for line in lines]
    if wide := [row.name for row in rows if row.gpus > args.gpus]:
        raise SystemExit(f"{', '.join(wide)}: more GPUs than --gpus {args.gpus}")
    ends = time.monotonic() + args.limit
    gpus, threads = Gpus(args.gpus), []

    def work(row: Row, taken: list[int]) -> None:
        try:
            run(row, taken, ends, args.logs)
        finally:
            gpus.give(taken)

    for row in rows:
        taken = gpus.take(row.gpus)
        if time.monotonic() + min(row.seconds, _LEAST) > ends:
            print(f"#### {row.name}: NOT RUN", flush=True)
            gpus.give(taken)
            continue
        threads.append(threading.Thread(target=work, args=(row, taken)))
        threads[-1].start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
