"""The first start of an engine on a bare machine, and its first run: kernels compiled ahead and not.

    python benchmarks/first_start.py [--shape qwen3-0.6b llama-3.1-8b] [--ahead on off] [--parts chat bare warm]
    python benchmarks/first_start.py --device cpu --shape smollm2-135m --workload short --tokens 512  # does it run?

Every row is an engine of its own, by the client that chat and batch use:

    chat   nothing compiled: start to the first token of a prompt of 128; then the next two prompts, one after the other
    bare   nothing compiled: start, then the workload at once, twice
    warm   with what the row before has compiled: the same

Nothing compiled: Triton's cache is a new folder, and with ``--bytecode`` so is Python's. "late": kernels that were
compiled when they were launched, until the engine was ready and from then on; "found": those that were compiled ahead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tpctl.bench.measure import timed
from tpctl.bench.shapes import SHAPES
from tpctl.bench.synthetic import shape_config, synthetic_shards
from tpctl.bench.workload import WORKLOADS, make_workload, one_request
from tpctl.client.engine_client import EngineClient
from tpctl.wire.settings import GPU_SEQS, GPU_TOKENS, POLICIES, EngineConfig

PARTS = ("chat", "bare", "warm")
NOTES = "tpctl-ahead"


@dataclass
class Row:
    """One engine. Seconds: ``ready`` from its start to where it takes requests, ``prompts`` of each prompt, ``runs`` of
    each run; ``rates``: tokens a second of each."""

    shape: str
    part: str
    ahead: str
    ready: float = 0.0
    first_token: float = 0.0
    prompts: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    found: int = 0
    late: tuple[int, int] = (0, 0)
    timings: dict[str, float] = field(default_factory=dict)


def compiled(folder: Path) -> tuple[int, int]:
    """Kernels in Triton's cache that were compiled ahead, and others."""
    ahead = len(list(folder.glob(f"{NOTES}/kernel-*")))
    return ahead, len(list(folder.glob("*/*.cubin"))) - ahead


def measure(args: argparse.Namespace, shape: str, part: str, ahead: str, cache: Path) -> Row:
    """One engine, from its start to its end."""
    config = EngineConfig(
        synthetic_shards(shape, args.tp).folder,
        args.tp,
        device=args.device,
        max_model_len=4096,
        max_num_seqs=GPU_SEQS,
        max_num_batched_tokens=GPU_TOKENS,
        scheduling_policy="fcfs" if part == "chat" else args.policy,
    )
    env = {"TRITON_CACHE_DIR": str(cache / "triton"), "TPCTL_COMPILE_AHEAD": ahead}
    if args.bytecode:
        env |= {"PYTHONPYCACHEPREFIX": str(cache / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    row, vocab = Row(shape, part, ahead), shape_config(shape).vocab_size
    _, before = compiled(cache / "triton")
    started = time.perf_counter()
    with EngineClient(config, env=env) as client:
        row.timings = client.wait_ready().timings
        row.ready = time.perf_counter() - started
        row.found, ready = compiled(cache / "triton")
        if part == "chat":
            row.prompts = [timed(client, [one_request(128, 1, number, vocab)]) for number in range(3)]
            row.first_token = row.ready + row.prompts[0]
        else:
            for run in range(2):
                work = make_workload(args.workload, vocab, run * 13)
                if args.tokens:
                    work.requests[:] = work.requests[: max(1, args.tokens // work.requests[0].sampling.max_tokens)]
                row.runs.append(timed(client, work.requests))
                row.rates.append(work.output_tokens / row.runs[-1])
    row.late = (ready - before, compiled(cache / "triton")[1] - ready)
    return row


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for shape in args.shape:
        synthetic_shards(shape, args.tp)
        for ahead in args.ahead:
            cache: tempfile.TemporaryDirectory[str] | None = None
            for part in args.parts:
                if cache is None or part != "warm":
                    cache = tempfile.TemporaryDirectory(prefix="first-start-")
                yield measure(args, shape, part, ahead, Path(cache.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen3-0.6b", "llama-3.1-8b"])
    parser.add_argument("--ahead", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workload", choices=WORKLOADS, default="nano")
    parser.add_argument("--tokens", type=int, help="of the workload only so many, to see whether it runs")
    parser.add_argument("--policy", choices=POLICIES, default="makespan")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--bytecode", action="store_true", help="compile Python's modules anew as well")
    parser.add_argument("--json", type=Path, help="where all rows go, each as soon as it is there")
    args = parser.parse_args()
    done = []
    for row in rows(args):
        done.append(asdict(row))
        print(f"{row.shape} {row.part} ahead {row.ahead}: ready {row.ready:.2f} s", end="")
        if row.prompts:
            print(
                f", first token {row.first_token:.2f} s; prompts {', '.join(f'{one:.3f}' for one in row.prompts)} s",
                end="",
            )
        if row.rates:
            print(f"; runs {', '.join(f'{rate:,.0f}' for rate in row.rates)} tok/s", end="")
        print(f"; found {row.found}, late {row.late[0]} + {row.late[1]}; {row.timings}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
