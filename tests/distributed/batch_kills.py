"""Kill processes of a batch over several replicas at random, go on each time, and compare with an undisturbed run.

    python -m tests.distributed.batch_kills [--rows 100000] [--replicas 4] [--tp 1] [--kills 30] [--seed 0]
        [--engine fast|demo] [--model demo] [--max-tokens 8] [--hosts FILE|slurm]
        [--limit 3600]

A kill is SIGKILL to a replica, one of its ranks, or the coordinator, which is then started again with ``--resume``;
they are spread over the run. With ``--hosts`` the process that stands for a replica (srun, ssh) is killed, too; inside
a SLURM job (``salloc --ntasks=4 python -m …``) also a step, as ``scancel`` does it. ``fast`` is an engine without a
model (``fast_worker.py``), in the same replicas; ``demo`` runs the model, in float32, on short prompts. Exits with 1
unless every id is there exactly once, in order, with the same content, and the published sums are those of the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.processes import with_variable
from tpctl.batch.folder import JobFolder, load, names

KINDS = ("replica", "rank", "coordinator", "launcher", "step")
LIMIT = 3600.0  # seconds for each of the two runs
PATIENCE = 20.0  # seconds until all processes have ended
MARK = "TPCTL_BATCH_KILLS"


@dataclass
class Report:
    """What happened.

    Attributes:
        kills: by kind; ``starts``: of the coordinator.
        wrong: what was not as it should be; empty if all was.
    """

    rows: int
    seconds: float = 0.0
    undisturbed: float = 0.0
    starts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    computed: int = 0
    needed: int = 0


@dataclass
class Batch:
    """One batch: its input, where to, and how."""

    prompts: Path
    out: Path
    replicas: int
    options: tuple[str, ...]
    env: dict[str, str]
    find: Callable[[str], dict[str, list[int]]] = field(default_factory=lambda: victims)

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tpctl", "batch", str(self.prompts), "-o", f"{self.out}/"]
        command += ["--replicas", str(self.replicas)] if self.replicas else []
        command += [*self.options, *more]
        with (self.out.parent / f"{self.out.name}.log").open("ab") as log:
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def rows(self) -> int:
        """Rows that are there, by the parts and the journals: whoever counts them may be dead."""
        folder = JobFolder(self.out)
        done = sum(_lines(part) for part in folder.parts().values())
        return done + sum(_lines(place / name) for place in (folder.work, folder.kept) for name in names(place))


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def write_prompts(path: Path, rows: int) -> Path:
    with path.open("w") as file:
        for number in range(rows):
            file.write(
                json.dumps({"id": f"row-{number}", "prompt": f"{number} and {number * 7919 % 1000} make"}) + "\n"
            )
    return path


def victims(mark: str) -> dict[str, list[int]]:
    """The batch's live processes by kind."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for pid in with_variable(f"{MARK}={mark}"):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        program = Path(command.partition(" ")[0]).name
        if " tpctl batch " in command:
            found["coordinator"].append(pid)
        elif program in ("srun", "ssh"):
            found["launcher"].append(pid)
        elif " tpctl replica " in command and program.startswith("python"):
            found["replica"].append(pid)
            if step_of(pid):
                found["step"].append(pid)
        elif "worker" in command:
            found["rank"].append(pid)
    return found


def step_of(pid: int) -> str:
    """``JOB.STEP`` of a process that srun started; empty for others."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    said = dict(variable.partition("=")[::2] for variable in variables)
    step = said.get("SLURM_STEP_ID", "")
    return f"{said['SLURM_JOB_ID']}.{step}" if step.isdigit() and int(step) < 1 << 31 else ""


def kill(kind: str, pid: int) -> bool:
    """Whether there was something to kill."""
    if kind == "step":
        step = step_of(pid)
        return bool(step) and subprocess.run(["scancel", "--signal=KILL", step]).returncode == 0
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_and_go_on(
    batch: Batch,
    mark: str,
    rows: int,
    kills: int,
    chance: random.Random,
    report: Report,
    events: Sequence[tuple[float, Callable[[], object]]] = (),
    limit: float = LIMIT,
) -> None:
    """Run a batch to its end, with so many kills, when about as many rows are there as chance says.

    Args:
        events: what else happens, each once that share of the rows is there.
        limit: seconds, after which it is given up.
    """
    events = sorted(events, key=lambda event: event[0])
    due = sorted(chance.uniform(0.02, 0.95) * rows for _ in range(kills))
    process = batch.start("--resume")
    report.starts = 1
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            if code >= 0 and not due and not events:
                report.wrong += [] if code == 0 else [f"exit code {code}"]
                return
            if code >= 0:
                report.wrong.append(f"exit code {code} with {len(due)} kills to come and {len(events)} events")
                return
            process = batch.start("--resume")
            report.starts += 1
        if events and batch.rows() >= events[0][0] * rows:
            events.pop(0)[1]()
        if due and batch.rows() >= due[0]:
            alive = batch.find(mark)
            kind = chance.choice([kind for kind, pids in alive.items() if pids] or ["none"])
            if kind != "none":
                if not kill(kind, chance.choice(alive[kind])):
                    continue
                report.kills[kind] += 1
                due.pop(0)
                if kind == "coordinator":
                    process.wait()
        time.sleep(chance.uniform(0.0, 0.2))
    process.kill()
    report.wrong.append(f"not done after {limit:.0f} s")


def processes(mark: str, patience: float) -> list[int]:
    """What is left of a batch after a while: a replica elsewhere ends a little later than what stands for it here."""
    deadline = time.monotonic() + patience
    while (left := with_variable(f"{MARK}={mark}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def compare(left: Path, right: Path, rows: int) -> list[str]:
    """What of the rows is not as in the other folder, or not once and in order."""
    wrong = []
    lines = [
        [line for number in sorted(JobFolder(root).parts()) for line in JobFolder(root).part(number).open()]
        for root in (left, right)
    ]
    ids = [json.loads(line)["id"] for line in lines[0]]
    if ids != [f"row-{number}" for number in range(rows)]:
        wrong.append(f"{len(ids)} rows, {len(set(ids))} different ids, of {rows}")
    differing = sum(a != b for a, b in zip(*lines, strict=False))
    if differing:
        wrong.append(f"{differing} rows are not those of the undisturbed run")
    for name in ("offers", "leases", "work", "finished", "kept"):
        if left_over := names(JobFolder(left).job / name):
            wrong.append(f"left in {name}: {left_over[:3]}")
    return wrong


def check_stats(root: Path, stats: Mapping[str, Any]) -> list[str]:
    """Which published sums are not those of the rows."""
    parts = JobFolder(root).parts().values()
    rows = [json.loads(line) for part in parts for line in part.open()]
    wrong = []
    for name in ("prompt_tokens", "completion_tokens"):
        if (found := sum(row.get(name, 0) for row in rows)) != stats.get(name):
            wrong.append(f"{name} are {found:,}, published {stats.get(name)}")
    if not 0 <= stats.get("cached_tokens", -1) <= stats.get("prompt_tokens", 0):
        wrong.append(f"cached_tokens are {stats.get('cached_tokens')}")
    return wrong


def run(
    scratch: Path,
    *,
    rows: int,
    replicas: int,
    kills: int,
    seed: int,
    engine: str = "fast",
    max_tokens: int = 8,
    options: tuple[str, ...] = (),
    delay: float = 0.0,
    limit: float = LIMIT,
    calm_replicas: int | None = None,
) -> Report:
    """Both runs, in ``scratch``; the undisturbed one over ``calm_replicas``, if not over as many."""
    report = Report(rows)
    prompts = write_prompts(scratch / "prompts.jsonl", rows)
    fixed = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "256", "--max-tokens", str(max_tokens))
    options = (*fixed, *options)
    mark = f"{os.getpid()}-{seed}"
    env = {**os.environ, MARK: mark, "FAST_WORKER_DELAY": str(delay)}
    if engine == "fast":
        env["TPCTL_WORKER"] = "tests.distributed.fast_worker"
    try:
        began = time.monotonic()
        calm = Batch(prompts, scratch / "calm", calm_replicas or replicas, options, env)
        if (code := calm.start().wait(limit)) != 0:
            report.wrong.append(f"the undisturbed run ended with {code}: {(scratch / 'calm.log').read_text()[-500:]}")
            return report
        report.undisturbed = time.monotonic() - began
        began = time.monotonic()
        stormy = Batch(prompts, scratch / "stormy", replicas, options, env)
        kill_and_go_on(stormy, mark, rows, kills, random.Random(seed), report, limit=limit)
        report.seconds = time.monotonic() - began
        report.wrong += compare(scratch / "stormy", scratch / "calm", rows)
        if report.wrong:
            report.wrong.append((scratch / "stormy.log").read_text()[-500:])
        stats = load(JobFolder(scratch / "stormy").stats) or {}
        report.computed, report.needed = stats.get("computed_tokens", 0), stats.get("completion_tokens", 0)
        report.wrong += check_stats(scratch / "stormy", stats)
        left = processes(mark, PATIENCE)
        report.wrong += [f"{len(left)} processes are left"] if left else []
    finally:
        for pid in with_variable(f"{MARK}={mark}"):
            os.kill(pid, signal.SIGKILL)
    return report


def conclude(report: Report, disturbed: str) -> NoReturn:
    """Say what came of a run, which was ``disturbed`` besides by kills, and end with 1 if anything is wrong."""
    print(
        f"{report.rows:,} rows: {report.undisturbed:.1f} s undisturbed, {report.seconds:.1f} s with {disturbed}"
        f"{sum(report.kills.values())} kills ({dict(report.kills)}), {report.starts} starts of the coordinator, "
        f"{report.computed:,} tokens computed for {report.needed:,}"
    )
    print("\n".join(report.wrong) or "every row once, in order, as undisturbed")
    sys.exit(bool(report.wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("fast", "demo"), default="fast")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--kv-cache-memory", help="of a replica; several on a small machine need less than all of it")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--hosts", help="as of tpctl batch; FILE says itself how many replicas there are")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that the fast engine takes for a group")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each of the two runs")
    args = parser.parse_args()
    memory = ("--kv-cache-memory", args.kv_cache_memory) if args.kv_cache_memory else ()
    hosts = ("--hosts", args.hosts) if args.hosts else ()
    with tempfile.TemporaryDirectory(prefix="batch-kills-") as scratch:
        report = run(
            Path(scratch),
            rows=args.rows,
            replicas=args.replicas if args.hosts in (None, "slurm") else 0,
            kills=args.kills,
            seed=args.seed,
            engine=args.engine,
            max_tokens=args.max_tokens,
            options=("--tp", str(args.tp), "--model", args.model, *memory, *hosts),
            delay=args.delay,
            limit=args.limit,
        )
    conclude(report, "")


if __name__ == "__main__":
    main()
