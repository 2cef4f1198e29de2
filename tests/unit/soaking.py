"""A soak of engines in this process, of tiny models whose layers keep different things: experts, two KV pools, states.

    python -m tests.unit.soaking [--requests 2000] [--together 100] [--tp 1]

Requests of every kind share prefixes and little memory, and some are given up. After every step blocks and states are
held against the sequences, and after every part none may be in use. It ends with an error where that is not so.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_ranks
from tests.tiny import make_mixture
from tests.unit.generating import memory_for
from tests.unit.test_same_tokens import SMALL_STATES
from tpctl.bench.mixed import Part, mixed_requests, soak
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Abort, Add, Message, Output, Request
from tpctl.wire.report import EngineStats
from tpctl.wire.settings import EngineConfig

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ({"attention_bias": False}, {}),
    "gpt_oss": ({"sliding_window": 7}, {"speculate": "ngram"}),
    "qwen3_next": (SMALL_STATES, {}),
}
"""Experts; and a pool for windows beside the one for all tokens; and states of recurrent layers."""
LONGEST = 24


class Running:
    """An engine in the place of an engine's client."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._told: list[Output] = []

    def submit(self, requests: list[Request]) -> None:
        self._apply(Add(requests))

    def abort(self, ids: list[str]) -> None:
        self._apply(Abort(ids))

    def _apply(self, message: Message) -> None:
        self._told += self.engine.apply(message)
        self.engine.scheduler.check_integrity()

    def outputs(self, timeout: float) -> list[Output]:
        """What one step more, at least, has led to."""
        while not self._told:
            self._told += self.engine.step()
            self.engine.scheduler.check_integrity()
        told, self._told = self._told, []
        return told

    def stats(self) -> EngineStats:
        return self.engine.stats()


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def parts(name: str, folder: Path, count: int, together: int, tp_size: int = 1) -> list[tuple[Part, int]]:
    """What is left of ``count`` requests to ``SHAPES[name]`` after each ``together`` of them, and what memory this
    process then has."""
    changes, settings = SHAPES[name]
    make_mixture(name, folder / "model", **changes)
    shard_checkpoint(folder / "model", folder / "shards", tp_size)
    memory = 2 * memory_for(folder / "shards", tp_size, 4 * LONGEST, 8)
    settings = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 40, **settings}
    config = EngineConfig(folder / "shards", tp_size, kv_cache_memory=memory, max_model_len=4 * LONGEST, **settings)

    def rank(group: TPGroup) -> list[tuple[Part, int]]:
        client: Any = Running(Engine(config, group))
        return [(part, resident()) for part in soak(client, mixed_requests(count, 131, LONGEST), together)]

    return run_ranks(tp_size, torch.inference_mode()(rank))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--together", type=int, default=100)
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()
    print("| shape | s | ended | steps | preemptions | prefix hits, tokens | drafts held | memory, MB, by part |")
    print("|---|---|---|---|---|---|---|---|")
    for name in SHAPES:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = parts(name, Path(folder), options.requests, options.together, options.tp)
        last, seconds = found[-1][0], time.perf_counter() - started
        ended = ", ".join(f"{count} {reason}" for reason, count in sorted(last.ended.items()))
        memory = ", ".join(f"{nbytes / 1e6:.0f}" for _, nbytes in found[:: max(1, len(found) // 5)])
        print(
            f"| {name} | {seconds:.0f} | {ended} | {last.stats.steps} | {last.stats.preemptions} | "
            f"{last.stats.prefix_cache_hit_tokens} | {last.stats.accepted_tokens} of {last.stats.draft_tokens} | "
            f"{memory} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
