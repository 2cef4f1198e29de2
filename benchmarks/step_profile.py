"""What one captured step launches on a GPU, in order, and how long each kernel keeps the next one waiting.

    python benchmarks/step_profile.py qwen3.6-35b-a3b:4 [--at 1 8] [--prompts 128] [--steps 20]

`:4` takes the first four layers of a shape, whose weights are made and read in seconds. Decodes of `--at` sequences,
each of a few hundred tokens, and prompts of `--prompts` tokens, one at a time. A line a kernel: microseconds from the
end of the one before to its own end, the mean of all steps, and from its own start to its end, which is more where it
was launched early. Then the same added up by name. The engine runs in this process, without client and workers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from tpctl.bench.synthetic import synthetic_shards
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.wire.messages import Abort, Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

_NAMES = itertools.count()


class Kernel(NamedTuple):
    """Of a step; microseconds, and its mean over all steps."""

    name: str
    since_last: float
    own: float


def requests(engine: Engine, count: int, tokens: int, answer: int) -> list[Request]:
    """Of prompts that nothing has seen."""
    vocab, params = engine.runner.loaded.config.vocab_size, SamplingParams(max_tokens=answer, ignore_eos=True)
    ids = torch.randint(10, vocab, (count, tokens)).tolist()
    return [Request(f"r{next(_NAMES)}", one, params) for one in ids]


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    while engine.runner.rest():
        pass


def folded(events: list[tuple[float, float, str]], steps: int) -> list[Kernel]:
    """The kernels of one step, of those of ``steps`` alike (start, end, name); of none, where they are not."""
    events.sort()
    size, left = divmod(len(events), steps)
    rounds = [events[at * size : (at + 1) * size] for at in range(steps)]
    if left or len({tuple(name for *_, name in one) for one in rounds}) != 1:
        return []
    found = []
    for at, (_, _, name) in enumerate(rounds[0]):
        ends = [one[at][1] - (one[at - 1][1] if at else one[at][0]) for one in rounds]
        found.append(Kernel(name, statistics.mean(ends), statistics.mean(one[at][1] - one[at][0] for one in rounds)))
    return found


def cuda_events(prof: profile) -> Iterator[tuple[float, float, str]]:
    for event in prof.events():  # type: ignore[no-untyped-call]
        if event.device_type.name == "CUDA":
            yield event.time_range.start, event.time_range.end, event.name


def show(title: str, events: list[tuple[float, float, str]], walls: list[float], lines: int) -> None:
    kernels = folded(events, len(walls))
    print(f"\n== {title}: {statistics.median(walls) * 1e3:.3f} ms a step ({min(walls) * 1e3:.3f} at the least)")
    if not kernels:
        print(f"its {len(walls)} steps differ; kernels of all of them:")
        kernels = folded(events, 1)
    for number, (name, since_last, own) in enumerate(kernels[:lines]):
        print(f"{number:4} {since_last:8.2f} {own:8.2f}  {name[:90]}")
    print(f"     {sum(one.since_last for one in kernels):8.2f} us in {len(kernels)} kernels; by name:")
    by_name: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel)
    for name, some in sorted(by_name.items(), key=lambda item: -sum(one.since_last for one in item[1])):
        total = sum(one.since_last for one in some)
        print(f"     {total:8.2f} = {len(some):4} x {total / len(some):7.2f}  {name[:90]}")


def decodes(engine: Engine, count: int, args: argparse.Namespace) -> None:
    """Steps of ``count`` sequences, once every prompt has been computed and the graph captured."""
    work = requests(engine, count, 128, 4 * args.steps + 64)
    engine.apply(Add(work))
    while any(sequence.num_uncomputed_tokens > 1 for sequence in engine.scheduler.running.values()) or (
        len(engine.scheduler.running) < count
    ):
        engine.step()
    for _ in range(args.steps):
        engine.step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(args.steps):
        engine.step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / args.steps
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(args.steps):
            engine.step()
        torch.cuda.synchronize()
    show(f"{count} decodes", list(cuda_events(prof)), [wall] * args.steps, args.lines)
    engine.apply(Abort([one.id for one in work]))
    finish(engine)


def prompts(engine: Engine, tokens: int, args: argparse.Namespace) -> None:
    """Prompts of so many tokens, each alone, as the first question of a chat is."""
    for _ in range(3):
        engine.apply(Add(requests(engine, 1, tokens, 1)))
        finish(engine)
    walls = []
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(args.steps):
            engine.apply(Add(requests(engine, 1, tokens, 1)))
            torch.cuda.synchronize()
            started = time.perf_counter()
            while engine.has_work:
                engine.step()
            torch.cuda.synchronize()
            walls.append(time.perf_counter() - started)
    show(f"a prompt of {tokens} tokens", list(cuda_events(prof)), walls, args.lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--at", type=int, nargs="*", default=[1])
    parser.add_argument("--prompts", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lines", type=int, default=80, help="kernels of a step that are shown one by one")
    parser.add_argument("--enforce-eager", action="store_true", help="launch kernel by kernel")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    started = time.perf_counter()
    folder = synthetic_shards(args.shape, 1).folder
    config = EngineConfig(
        folder,
        1,
        device="cuda",
        max_model_len=4096,
        max_num_seqs=max([8, *args.at]),
        enforce_eager=args.enforce_eager,
    )
    engine = Engine(config, TPGroup(0, 1, "cuda"))
    took = time.perf_counter() - started
    print(f"{args.shape}, {torch.cuda.get_device_name()}, torch {torch.__version__}, started in {took:.1f} s")
    for count in args.at:
        decodes(engine, count, args)
    for tokens in args.prompts:
        prompts(engine, tokens, args)


if __name__ == "__main__":
    main()
