"""What real models are asked, and engines that answer side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.ranks import run_ranks
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.report import EngineStats
from tpctl.wire.settings import EngineConfig

TEXTS = (
    "The capital of France is a city that is known all over the world for its museums",
    "Once upon a time there was a little girl who lived in a house near the forest and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "In 1969 the first human beings set foot on the Moon. The mission was called Apollo",
    "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve,",
    "Question: Why is the sky blue? Answer: Because the light of the sun is scattered by",
    "Die Hauptstadt von Deutschland ist Berlin, und die Hauptstadt von Italien ist Rom, und",
    "My favourite recipe for a rainy Sunday needs two onions, a handful of mushrooms and",
)

Tokens = dict[str, list[int]]


def collect(tokens: Tokens, outputs: Sequence[Output]) -> int:
    """Sort new tokens by request; how many requests ended."""
    for output in outputs:
        assert output.finish_reason != "error", output.message
        tokens.setdefault(output.id, []).extend(output.token_ids)
    return sum(output.finish_reason is not None for output in outputs)


def run_in_threads(config: EngineConfig, groups: Sequence[Sequence[Request]]) -> tuple[Tokens, EngineStats]:
    """Each group of requests together, one group after the other; every rank must compute the same tokens."""

    def rank(group: TPGroup) -> tuple[Tokens, EngineStats]:
        torch.set_num_threads(1)  # else every thread brings a pool of its own
        tokens: Tokens = {}
        with torch.no_grad():
            engine = Engine(config, group)
            for requests in groups:
                collect(tokens, engine.apply(Add(list(requests))))
                while engine.has_work:
                    collect(tokens, engine.step())
            return tokens, engine.stats()  # which checks the block manager's books

    threads = torch.get_num_threads()
    try:
        first, *others = run_ranks(config.tp_size, rank)
    finally:
        torch.set_num_threads(threads)
    assert all(tokens == first[0] for tokens, _ in others)
    return first
