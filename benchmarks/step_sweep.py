"""Other cuts of a model's linears and experts, each in its place in a captured decode step of one sequence.

    python benchmarks/step_sweep.py qwen3.6-35b-a3b:4 [--only 12352x2048 lm_head experts] [--steps 60]

Where kernels start while the one before still runs, a cut that is best by itself (`gemv_sweep.py`, `expert_bench.py
sweep`) need not be best between others. Microseconds of a step with what is picked, and how many more or fewer it takes
with each other cut, one at a time; the least of three rounds. The first line comes again at the end: how far it is off
is what the others may be off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from step_profile import finish, requests

from tpctl.bench.synthetic import synthetic_shards
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.kernels.experts import one_row
from tpctl.kernels.linear import gemv
from tpctl.kernels.linear.gemv import GemvConfig
from tpctl.layers.weights import kernels as weights
from tpctl.wire.messages import Abort, Add
from tpctl.wire.settings import EngineConfig

_ROUNDS = 3
Size = tuple[int, int]


class Cut(NamedTuple):
    """What is cut, how, and what makes the kernels take it."""

    what: str
    config: tuple[Any, ...]
    use: Callable[[], AbstractContextManager[Any]]


def linears(outputs: int, inputs: int) -> Iterator[GemvConfig]:
    """Cuts of a linear: all of a row in one tile, or parts of it that are asked for before the wait."""
    for block_n, block_k, warps, ahead in (
        (4, 512, 1, 1),
        (4, 512, 1, 3),
        (2, 1024, 1, 1),
        (8, 512, 2, 1),
        (4, 1024, 2, 1),
        (4, 2048, 4, 1),
    ):
        if block_k <= inputs:
            yield GemvConfig(block_n, block_k, num_warps=warps, prefetch=min(ahead, -(-inputs // block_k) - 1))


def experts(now: one_row.RowConfig) -> Iterator[one_row.RowConfig]:
    """Those of gate_up, then of down, with about as many bytes under way."""
    for n, k, stages in ((4, 2048, 5), (16, 1024, 3), (16, 512, 5)):
        yield now._replace(up_n=n, up_k=k, up_stages=stages)
    for n, k, stages in ((16, 512, 5), (16, 256, 17), (8, 512, 17)):
        yield now._replace(down_n=n, down_k=k, down_stages=stages)


def _given(row: one_row.RowConfig, *_: Any, **__: Any) -> one_row.RowConfig:
    return row


def cuts(seen: dict[Size, GemvConfig], row: one_row.RowConfig | None, only: list[str]) -> Iterator[Cut]:
    """All others than what is picked, of what a step has been seen to call."""
    for size, picked in seen.items():
        name = "lm_head" if size[0] >= 32768 else f"{size[0]}x{size[1]}"
        for one in linears(*size) if name in only or not only else ():
            if one != picked:
                yield Cut(name, tuple(one), partial(patch.dict, gemv._ONE_ROW, {size: one}))
    if row is not None and ("experts" in only or not only):
        for other in experts(row):
            use = partial(patch.object, one_row, "pick_row", partial(_given, other))
            yield Cut("experts", tuple(other), use)


def step_us(engine: Engine, steps: int) -> float:
    """Of one step of a new sequence, captured anew."""
    (work,) = requests(engine, 1, 128, 8 * steps)
    engine.apply(Add([work]))
    while not any(one.num_uncomputed_tokens == 1 for one in engine.scheduler.running.values()):
        engine.step()
    try:
        torch.cuda.synchronize()
        graphs: Any = engine.runner._graphs  # type: ignore[attr-defined]
        graphs._steps._graphs.clear()
        found = []
        for _ in range(_ROUNDS + 1):  # the first captures
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
            found.append((time.perf_counter() - started) / steps * 1e6)
    finally:
        engine.apply(Abort([work.id]))
        finish(engine)
    return min(found[1:])


def watched(engine: Engine, steps: int) -> tuple[float, dict[Size, GemvConfig], one_row.RowConfig | None]:
    """Microseconds of a step, and what it picks: by outputs and inputs of linears of one row, and for experts."""
    seen: dict[Size, GemvConfig] = {}
    rows: list[one_row.RowConfig] = []
    pick, pick_row = gemv.pick, one_row.pick_row

    def saw(count: int, outputs: int, inputs: int, *, gated: bool = False, **more: Any) -> GemvConfig | None:
        found = pick(count, outputs, inputs, gated=gated, **more)
        if count == 1 and not gated and found is not None:
            seen[outputs, inputs] = found
        return found

    def saw_row(*sizes: int, **more: Any) -> one_row.RowConfig:
        rows.append(pick_row(*sizes, **more))
        return rows[-1]

    with (
        patch.object(gemv, "pick", saw),
        patch.object(weights, "pick", saw),
        patch.object(one_row, "pick_row", saw_row),
    ):
        us = step_us(engine, steps)
    return us, seen, rows[-1] if rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--only", nargs="*", default=[], help="of these alone: OUTPUTSxINPUTS, lm_head, experts")
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    folder = synthetic_shards(args.shape, 1).folder
    config = EngineConfig(folder, 1, device="cuda", max_model_len=4096, max_num_seqs=8)
    engine = Engine(config, TPGroup(0, 1, "cuda"))
    step_us(engine, args.steps)
    first, seen, row = watched(engine, args.steps)
    print(f"{args.shape}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n{first:9.1f} us a step as picked")
    for size, picked in seen.items():
        print(f"          {size[0]}x{size[1]}: {tuple(picked)}")
    if row is not None:
        print(f"          experts: {tuple(row)}")
    for cut in cuts(seen, row, args.only):
        try:
            with cut.use():
                us = f"{step_us(engine, args.steps) - first:+9.1f}"
        except Exception as error:  # more shared memory or registers than there are
            us = f"{type(error).__name__:>9}"
        print(us, cut.what, cut.config, flush=True)
    print(f"{step_us(engine, args.steps) - first:+9.1f} us as picked, again")


if __name__ == "__main__":
    main()
