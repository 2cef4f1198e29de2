"""Kill each process of an engine in each phase of its life: what is said, when, and who is left?

    python -m tests.distributed.kill_matrix [--load 10] [--model demo | --shape qwen3-0.6b] [--tp 2]
        [--targets rank0 …] [--phases idle …]

On the GPUs, where there are as many as ranks, else on the CPU. On GPUs, decode is a captured step, and their memory
has to be free again within that time. A *front* process runs the engine as ``chat`` and ``batch`` do; parent is that
process, agent is torchrun. ``--load`` runs so many spinning processes meanwhile. Seconds count from the kill until the
reason is said, no process of the engine is left and the GPUs' memory is free. Exits with 1 if a cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.processes import spinning, with_variable

TARGETS = ("parent", "agent", "rank0", "rank1")
PHASES = ("loading", "idle", "prefill", "decode")
REASONS = {
    "agent": "the launcher was ended by SIGKILL",
    "rank0": "rank 0 was killed (SIGKILL)",
    "rank1": "rank 1 was killed (SIGKILL)",
}
LIMIT = 15.0  # seconds from the kill to the end of everything
_PATIENCE = 300.0  # seconds for a phase to be reached on a busy machine
_PROMPT = 1900  # tokens; computing them takes longer than the kill
_NOISE = 64  # MiB that a GPU's own bookkeeping may differ by
_RANK = re.compile(r"/attempt_0/(\d+)/std")


@dataclass(frozen=True)
class Cell:
    """What a kill led to.

    Attributes:
        reason: what the front said; empty if it was the one that was killed.
        seconds: from the kill until the reason was said and no process was left.
        orphans: processes of the engine that were left after ``LIMIT`` seconds.
        held: whether the phase lasted until the kill.
        kept: MiB of the GPUs' memory that are taken afterwards and were not before.
    """

    target: str
    phase: str
    reason: str
    seconds: float
    orphans: int
    held: bool
    kept: int = 0

    @property
    def right(self) -> bool:
        said = self.reason.startswith(REASONS[self.target]) if self.target in REASONS else not self.reason
        return said and self.held and not self.orphans and self.seconds <= LIMIT and self.kept < _NOISE


def gpu_memory() -> int:
    """MiB that are taken of all GPUs, whoever took them; 0 where there are none."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))


def front(folder: Path, phase: str, tp_size: int) -> None:
    """The process that is called parent: goes as far as ``phase``, says so, and says how the engine ended."""
    import torch

    from tpctl.bench.workload import one_request
    from tpctl.client.engine_client import EngineClient
    from tpctl.errors import TpctlError
    from tpctl.wire.settings import EngineConfig

    def say(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), flush=True)

    device = "cuda" if torch.cuda.device_count() >= tp_size else "cpu"
    with EngineClient(EngineConfig(folder, tp_size, device=device)) as client:
        # An engine that is idle has nobody who waits for it: the reason must come by itself.
        ended = threading.Event()
        client.on_failure(lambda error: (say("reason", text=str(error)), ended.set()))
        say("started")
        try:
            client.wait_ready()
            say("ready")
            if phase == "idle":
                ended.wait()
            client.submit([one_request(_PROMPT if phase == "prefill" else 16, 2 if phase == "prefill" else 1000, 0, 9)])
            say("submitted")
            while True:
                for output in client.outputs():
                    say("tokens", count=len(output.token_ids))
        except TpctlError:
            ended.wait()


def run_cell(folder: Path, target: str, phase: str, tp_size: int = 2) -> Cell:
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        command = [sys.executable, "-m", "tests.distributed.kill_matrix", "--front", str(folder), phase, str(tp_size)]
        env = {**os.environ, "TMPDIR": scratch}
        taken = gpu_memory()
        parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(parent.stdout, events), daemon=True).start()
        try:
            _reach(events, phase)
            victim = parent.pid if target == "parent" else _until(lambda: find(scratch, target))
            if phase == "prefill":
                time.sleep(0.1)  # the request is on its way
            before = _drain(events)
            os.kill(victim, signal.SIGKILL)
            started = time.monotonic()
            reason, seen = _reason(events, started)
            while processes(scratch) and time.monotonic() < started + LIMIT:
                time.sleep(0.02)
            kept = _kept(taken, started + LIMIT)
            seconds = time.monotonic() - started
            late = {"loading": "ready", "idle": "submitted", "prefill": "tokens"}.get(phase)
            held = late not in [event["event"] for event in before + seen]
            return Cell(target, phase, reason, seconds, len(processes(scratch)), held, kept)
        finally:
            parent.kill()
            parent.wait()
            for pid in processes(scratch):
                os.kill(pid, signal.SIGKILL)


def _kept(before: int, deadline: float) -> int:
    """MiB of the GPUs that are taken beside ``before``, once they are free or the time is up: the driver is still
    giving memory back for a while after a process can be seen no more."""
    while (kept := gpu_memory() - before) >= _NOISE and time.monotonic() < deadline:
        time.sleep(0.1)
    return kept


def processes(scratch: str) -> list[int]:
    """Ids of the live processes of an engine whose folder lies in ``scratch``."""
    return with_variable(f"TPCTL_RUN={scratch}/")


def find(scratch: str, target: str) -> int | None:
    """The agent's or a rank's id: a rank is one that writes into that rank's log."""
    ranks: dict[int, str] = {}
    for pid in processes(scratch):
        try:
            log = _RANK.search(os.readlink(f"/proc/{pid}/fd/2"))  # noqa: PTH115 — the link, whatever it leads to
        except OSError:
            continue
        ranks[pid] = f"rank{log[1]}" if log else "agent"
    return next((pid for pid, name in sorted(ranks.items()) if name == target), None)


def _read(stream: IO[str], events: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in stream:
        events.put(json.loads(line))
    events.put(None)


def _reach(events: queue.SimpleQueue[dict[str, Any] | None], phase: str) -> None:
    wanted = {"loading": "started", "idle": "ready", "prefill": "submitted", "decode": "tokens"}[phase]
    while True:
        event = events.get(timeout=_PATIENCE)
        assert event is not None, f"the front ended before it was {phase}"
        assert event["event"] != "reason", event
        if event["event"] == wanted:
            return


def _drain(events: queue.SimpleQueue[dict[str, Any] | None]) -> list[dict[str, Any]]:
    found = []
    while not events.empty():
        event = events.get()
        if event is not None:
            found.append(event)
    return found


def _reason(events: queue.SimpleQueue[dict[str, Any] | None], started: float) -> tuple[str, list[dict[str, Any]]]:
    """What the front says of the end, and what it said before."""
    seen: list[dict[str, Any]] = []
    while (left := started + LIMIT - time.monotonic()) > 0:
        try:
            event = events.get(timeout=left)
        except queue.Empty:
            break
        if event is None:
            break
        if event["event"] == "reason":
            return event["text"], seen
        seen.append(event)
    return "", seen


def _until(ask: Callable[[], int | None]) -> int:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if (found := ask()) is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("the process did not appear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--shape", help="random weights of a known shape, in place of a model")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--front", nargs=3, metavar=("FOLDER", "PHASE", "TP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.front:
        front(Path(args.front[0]), args.front[1], int(args.front[2]))
        return

    from tpctl.bench.synthetic import synthetic_shards
    from tpctl.checkpoint.sources import resolve
    from tpctl.sharding.cache import ensure_sharded

    made = args.shape and synthetic_shards(args.shape, args.tp).folder
    folder = made or ensure_sharded(resolve(args.model), args.tp)
    wrong = 0
    with spinning(args.load):
        print(f"load average {os.getloadavg()[0]:.1f}, {args.load} of them spinning for this\n")
        print("| killed | while | reason | s | orphans | MiB kept | |\n|---|---|---|---|---|---|---|", flush=True)
        for target in args.targets:
            for phase in args.phases:
                cell = run_cell(folder, target, phase, args.tp)
                wrong += not cell.right
                mark = "right" if cell.right else "WRONG" if cell.held else "phase passed"
                said = cell.reason.partition(",")[0] or "(none to say)"
                print(
                    f"| {target} | {phase} | {said} | {cell.seconds:.1f} | {cell.orphans} | {cell.kept} | {mark} |",
                    flush=True,
                )
    print(f"\nload average at the end {os.getloadavg()[0]:.1f}; {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
