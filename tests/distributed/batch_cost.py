"""What a batch's coordinator costs a row, how much memory it takes, and how soon it begins: with replicas that have no
engine.

    python -m tests.distributed.batch_cost [--rows 1000000] [--replicas 1 16 64] [--resume] [--documents 5000]
        [--folder FOLDER]

Each line: replicas, rows a second, the coordinator's CPU time a row (planning and ids included), its largest resident
memory, seconds until the first lease. ``--resume`` interrupts a run half-way, and says how soon the next one goes on.
With ``--documents`` each row begins with 200 bytes that one in so many has, so that parts are divided into shares.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tpctl.batch.claim import claimed
from tpctl.batch.coordinator import Coordinator, Progress
from tpctl.batch.folder import JobFolder, names
from tpctl.batch.formats.choose import plain
from tpctl.batch.local import Local
from tpctl.batch.manifest import write_manifest
from tpctl.batch.plan import Plan, division_of


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU and of the clock, bytes; ``first_lease``: seconds from the start until a replica had one."""

    rows: int
    seconds: float
    cpu_seconds: float
    first_lease: float
    resident: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, {self.rows / self.seconds:,.0f} rows/s, "
            f"{self.cpu_seconds / max(1, self.rows) * 1e6:.1f} µs of coordinator a row, {self.resident / 1e6:.0f} MB, "
            f"first lease after {self.first_lease:.2f} s"
        )


def write_prompts(path: Path, rows: int, documents: int | None = None) -> Path:
    with path.open("w") as file:
        for number in range(rows):
            text = f"{number % documents} or so " * 20 if documents else ""
            asked = f"{text}What is the square of {number}, and why is that so?"
            file.write(f'{{"id": "row-{number}", "prompt": "{asked}"}}\n')
    return path


def measure(root: Path, prompts: Path, replicas: int, *, until: int | None = None) -> Cost:
    """Run, in this process; ``until`` so many rows are there."""
    folder = JobFolder(root)
    began = time.monotonic()
    cpu = time.process_time()
    first = 0.0
    start = 0

    def step(progress: Progress) -> None:
        nonlocal first
        assert any(process.poll() is None for process in running), "all replicas have ended"
        if not first and (names(folder.leases) or names(folder.finished)):
            first = time.monotonic() - began

    with claimed(folder):
        plan = Plan(folder, plain(prompts), division_of(plain(prompts), replicas))
        write_manifest(folder, {}, plan)
        with Coordinator(folder, plan, Local(root, [], "")) as coordinator:
            start = coordinator.board.sums.rows
            command = [sys.executable, "-m", "tests.distributed.light_replica", str(root), str(prompts)]
            running = [subprocess.Popen([*command, f"light-{began:.0f}-{number}"]) for number in range(replicas)]
            sums = coordinator.board.sums
            coordinator.run(step, lambda: until is not None and sums.rows - start >= until)
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        for process in running:
            process.wait()
        write_manifest(folder, {}, plan)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(coordinator.board.sums.rows - start, seconds, cpu, first, peak)


def check(root: Path, rows: int) -> None:
    """Every id is there once, in the order of the input."""
    number = 0
    for part in range(len(JobFolder(root).parts())):
        with JobFolder(root).part(part).open() as file:
            for line in file:
                assert json.loads(line)["id"] == f"row-{number}", (part, line)
                number += 1
    assert number == rows, f"{number} of {rows} rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        prompts = write_prompts(Path(scratch, "prompts.jsonl"), args.rows, args.documents)
        for replicas in args.replicas:
            root = Path(scratch, f"out-{replicas}")
            if args.resume:
                print(f"{replicas} replicas, first half: {measure(root, prompts, replicas, until=args.rows // 2)}")
            print(f"{replicas} replicas: {measure(root, prompts, replicas)}", flush=True)
            check(root, args.rows)


if __name__ == "__main__":
    main()
