"""What the GPUs of one host do, in one call: a table and JSON, each row as soon as it is there.

    python benchmarks/many_gpus.py --gpus 2 [--only dense sums tests …] [--json OUT/many.json] [--limit 560]
    python benchmarks/many_gpus.py --gpus 2 --dry-run
    python benchmarks/many_gpus.py --gpus 1

Of two, four and eight:

    kills       a rank, and the agent, killed in a captured step: what is said, when, and the GPUs' memory
    replicas    ``tpctl batch`` by one engine over all GPUs, and by replicas of half as many, of two and of one
    dense       Qwen3-0.6B and Llama-8B at tp = the GPUs: nano in both policies, TPOT and TTFT, start-up
    tests       tests/gpu with as many ranks, and 2,000 mixed requests
    sums        the all-reduce of peer memory beside NCCL, by size
    uneven      Llama-8B at every smaller tp that divides no heads evenly (3, 5, 6, 7)
    large       Llama-70B: TPOT and throughput
    experts     Qwen3-30B-A3B, bfloat16 and FP8, its experts cut and dealt whole; gpt-oss-20b

Of one, all in docs/performance.md:

    dense       as above
    quantised   Llama-8B in 4 bits and FP8: steps of few sequences, nano
    mixtures    Qwen3-30B-A3B, bfloat16 and FP8, and gpt-oss-20b: TPOT, steps, throughput
    prompts     Llama-8B: first token of 16,000, 32 x 12,000, shared prefixes
    layers      Gemma-3-12B, Qwen3.6-35B-A3B, Moonlight: TPOT, steps, nano
    drafts      tokens a second with speculation, by n-grams of real text and by a model's own layer
    door        ``tpctl serve``: its share of a step with 256 streams
    kernels     linears of codes, attention of prompts

Each row is a command of its own, which is printed with it and can be run alone. ``--limit``: seconds for all; what
would begin later is not begun, and named. ``--each``: seconds for one row, and three times as many for one of tests;
what it had printed by then is its text. Weights of a shape are deleted behind its last row: those of all would fill a
disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from process_tree import kill_all

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # where tpctl is, if it is not installed
TPCTL = (sys.executable, "-m", "tpctl")
DENSE = ("qwen3-0.6b", "llama-3.1-8b")


@dataclass(frozen=True)
class Run:
    """One row: a command, and whether its output is that of ``tpctl bench --json``, or text."""

    section: str
    name: str
    command: tuple[str, ...]
    is_json: bool = True

    @property
    def shown(self) -> str:
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words).replace(f"{HERE.parent}/", "").replace("python -m tpctl", "tpctl")


@dataclass
class Found:
    """What came of it: ``figures`` name -> (median, least, greatest, unit); ``text``: its end, or that of the error."""

    code: int
    seconds: float
    figures: dict[str, tuple[float, float, float, str]] = field(default_factory=dict)
    text: str = ""


def bench(section: str, kind: str, shape: str, tp_size: int, *more: str, runs: int = 3, longest: int = 4096) -> Run:
    options = ("--shape", shape, "--tp", str(tp_size), "--runs", str(runs), "--max-model-len", str(longest), *more)
    name = " ".join((shape, kind, f"tp {tp_size}", *more)).replace("--", "")
    return Run(section, name, (*TPCTL, "bench", kind, *options, "--json"))


def dense(gpus: int) -> Iterator[Run]:
    for shape in DENSE:
        for policy in ("fcfs", "makespan"):
            yield bench("dense", "throughput", shape, gpus, "--workload", "nano", "--scheduling-policy", policy)
        yield bench("dense", "latency", shape, gpus, "--sequences", "1,8,64")
        yield bench("dense", "startup", shape, gpus)


def tests(gpus: int) -> Iterator[Run]:
    pytest = (sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-m", "gpu", "-n", "4", "--durations=5")
    for name in ("test_kernels_all_reduce.py", "test_many_gpus.py", "test_real_weights.py"):
        yield Run("tests", name, (*pytest, str(HERE.parent / "tests/gpu" / name)), False)
    soak = (sys.executable, str(HERE / "soak.py"), "--shape", "qwen3-0.6b", "--tp", str(gpus))
    yield Run("tests", "soak", soak, False)


def sums(gpus: int) -> Iterator[Run]:
    for size in sorted({2, gpus}):
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
        yield Run("sums", f"{size} GPUs", (*torchrun, str(HERE / "kernel_bench.py"), "all_reduce"), False)


def uneven(gpus: int) -> Iterator[Run]:
    for size in (3, 5, 6, 7):
        if size <= gpus:
            yield bench("uneven", "latency", "llama-3.1-8b", size)


def large(gpus: int) -> Iterator[Run]:
    yield bench("large", "latency", "llama-3.1-70b", gpus, "--sequences", "1,8,64")
    yield bench("large", "throughput", "llama-3.1-70b", gpus, "--workload", "nano", runs=1)
    yield bench("large", "startup", "llama-3.1-70b", gpus)


def experts(gpus: int) -> Iterator[Run]:
    for shape in ("qwen3-30b-a3b", "qwen3-30b-a3b-fp8", "gpt-oss-20b"):
        for ep in sorted({1, gpus}):
            yield bench("experts", "latency", shape, gpus, "--ep", str(ep), "--sequences", "1,8,64")
        yield bench("experts", "throughput", shape, gpus, "--workload", "nano", runs=1)


def replicas(gpus: int) -> Iterator[Run]:
    script = (sys.executable, str(HERE / "replicas.py"), "--shape", "llama-3.1-8b", "--rows", "2000")
    for size in sorted({gpus, max(1, gpus // 2), min(2, gpus), 1}, reverse=True):
        more = ("--tp", str(size), "--replicas", str(gpus // size))
        yield Run("replicas", f"{gpus // size} of tp {size}", (*script, *more), False)


def kills(gpus: int) -> Iterator[Run]:
    script = (sys.executable, "-m", "tests.distributed.kill_matrix", "--shape", "llama-3.1-8b", "--tp", str(gpus))
    yield Run("kills", "in a captured step", (*script, "--targets", "rank1", "agent", "--phases", "decode"), False)


def quantised(gpus: int) -> Iterator[Run]:
    for shape in ("llama-3.1-8b-w4a16", "llama-3.1-8b-fp8"):
        yield bench("quantised", "latency", shape, gpus, "--sequences", "1,2,4,8,64")
        yield bench("quantised", "throughput", shape, gpus, "--workload", "nano", runs=1)


def mixtures(gpus: int) -> Iterator[Run]:
    for shape in ("qwen3-30b-a3b", "qwen3-30b-a3b-fp8", "gpt-oss-20b"):
        yield bench("mixtures", "latency", shape, gpus, "--sequences", "1,8,64", "--output-tokens", "128")
        workload = "even" if shape.startswith("gpt-oss") else "nano"
        yield bench("mixtures", "throughput", shape, gpus, "--workload", workload, runs=1)


def prompts(gpus: int) -> Iterator[Run]:
    shape, in_order = "llama-3.1-8b", ("--scheduling-policy", "fcfs")
    asked = ("--prompt-tokens", "16000", "--output-tokens", "8")
    yield bench("prompts", "latency", shape, gpus, *asked, longest=16384)
    yield bench("prompts", "throughput", shape, gpus, "--workload", "long", *in_order, runs=2, longest=16384)
    yield bench("prompts", "throughput", shape, gpus, "--workload", "prefix", *in_order, runs=2)


def layers(gpus: int) -> Iterator[Run]:
    for shape in ("gemma-3-12b", "qwen3.6-35b-a3b", "moonlight-16b-a3b"):
        yield bench("layers", "latency", shape, gpus, "--sequences", "1,8,64", "--output-tokens", "128", runs=2)
        yield bench("layers", "throughput", shape, gpus, "--workload", "nano", runs=1)


def drafts(gpus: int) -> Iterator[Run]:
    spoken = ("demo", "--device", "cuda", "--runs", "3", "--warm", "2", "--tokens", "200")
    yield Run("drafts", "n-grams", (sys.executable, str(HERE / "speculation_bench.py"), *spoken), False)
    for family in ("deepseek_v3", "qwen3_5_text"):
        made = ("--family", family, "--layers", "8", "--runs", "3")
        yield Run("drafts", family, (sys.executable, str(HERE / "mtp_bench.py"), *made), False)


def door(gpus: int) -> Iterator[Run]:
    for shape in DENSE:
        asked = ("--shape", shape, "--rounds", "3", "--alone")
        yield Run("door", shape, (sys.executable, str(HERE / "serve_gpu.py"), *asked), False)


def kernels(gpus: int) -> Iterator[Run]:
    codes = ("layer", "--kinds", "gptq", "fp8 channel")
    yield Run("kernels", "codes", (sys.executable, str(HERE / "codes_bench.py"), *codes), False)
    yield Run("kernels", "prompts", (sys.executable, str(HERE / "prefill_bench.py")), False)


SECTIONS = {
    "kills": kills,
    "replicas": replicas,
    "dense": dense,
    "sums": sums,
    "uneven": uneven,
    "experts": experts,
    "large": large,
    "tests": tests,
}
OF_ONE = {
    "dense": dense,
    "quantised": quantised,
    "mixtures": mixtures,
    "prompts": prompts,
    "layers": layers,
    "drafts": drafts,
    "door": door,
    "kernels": kernels,
}


def measured(run: Run, seconds: float) -> Found:
    """Run it for so many seconds at most. A command that fails is a row that says how; lines of text are printed as
    they come, so that a command that is cut off has shown how far it was."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    print(f"## {run.section}: {run.name}\n\n    {run.shown}\n", flush=True)
    began = time.monotonic()
    command = subprocess.Popen(
        run.command, env=env, cwd=HERE.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=None if run.is_json else subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    end = threading.Timer(seconds, kill_all, (command.pid,))
    end.start()
    lines = []
    assert command.stdout is not None
    for line in command.stdout:
        lines.append(line)
        if not run.is_json:
            print(line, end="", flush=True)
    code = command.wait()
    end.cancel()
    took, text = time.monotonic() - began, "".join(lines)
    if code:
        late = f"not done after {took:.0f} s\n" if code == -signal.SIGKILL else ""
        return Found(code, took, text=late + text[-1500:].strip())
    if not run.is_json:
        return Found(0, took, text=text.strip()[-4000:])
    figures = json.loads(text)["figures"]
    return Found(0, took, {k: (f["median"], f["min"], f["max"], f["unit"]) for k, f in figures.items()})


def drop(shape: str) -> None:
    """Delete the weights of a shape."""
    from tpctl.bench.synthetic import synthetic_folders

    for folder in synthetic_folders(shape):
        shutil.rmtree(folder, ignore_errors=True)


def shape_of(run: Run) -> str | None:
    return run.command[run.command.index("--shape") + 1] if "--shape" in run.command else None


def show(found: Found) -> None:
    for name, (median, low, high, unit) in found.figures.items():
        print(f"| {name} | {median:,.2f} {unit} | {low:,.2f} to {high:,.2f} |")
    said = f"FAILED ({found.code}): {found.text}" if found.code else "done"
    print(f"{said}, {found.seconds:.0f} s\n", flush=True)


def machine() -> dict[str, object]:
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": gpus, "torch": torch.__version__, "cores": os.cpu_count(), "time": time.strftime("%F %T")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--only", nargs="+", choices=[*(SECTIONS | OF_ONE)])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=560.0)
    parser.add_argument("--each", type=float, default=150.0)
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args()
    sections = OF_ONE if args.gpus == 1 else SECTIONS
    only = args.only or [*sections]
    if missing := [section for section in only if section not in sections]:
        parser.error(f"of {args.gpus} GPUs there is no {' and no '.join(missing)}: {', '.join(sections)}")
    runs = [run for section in only for run in sections[section](args.gpus)]
    if args.dry_run:
        print("\n".join(run.shown for run in runs))
        return
    here = machine()
    print(f"{here}\n")
    ends, rows = time.monotonic() + args.limit, []
    for number, run in enumerate(runs):
        left = ends - time.monotonic()
        if left < 20:
            print("NOT RUN:", "; ".join(f"{one.section}: {one.name}" for one in runs[number:]))
            break
        found = measured(run, min(left, args.each * (3 if run.section == "tests" else 1)))
        if (shape := shape_of(run)) is not None and shape not in map(shape_of, runs[number + 1 :]):
            drop(shape)
        show(found)
        rows.append({"section": run.section, "name": run.name, "command": run.shown, **vars(found)})
        if args.json:
            args.json.write_text(json.dumps({"machine": here, "rows": rows}, indent=1))
    sys.exit(any(row["code"] for row in rows))


if __name__ == "__main__":
    main()
