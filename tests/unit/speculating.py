"""Engines that speculate, and their answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_ranks
from tests.unit.generating import PROMPTS
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.report import EngineStats, TokenLogprob
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

TOKENS = 40

LOOPS = [[5, 6, 7, 8] * 6, [9, 9, 9], [(7 * i) % 120 + 3 for i in range(40)]]
"""Of a random model nearly every answer soon repeats itself, which is what speculation finds."""

WAYS = {
    "greedy": {},
    "sampled": {"temperature": 0.1},
    "nucleus": {"temperature": 0.15, "top_p": 0.7},
    "top k": {"temperature": 0.2, "top_k": 3, "min_p": 0.05},
    "penalties": {"temperature": 0.1, "repetition_penalty": 1.01, "presence_penalty": 0.02, "frequency_penalty": 0.01},
    "greedy penalties": {"repetition_penalty": 1.02, "frequency_penalty": 0.02},
    "log-probabilities": {"logprobs": 3},
    "least": {"min_tokens": 20, "stop_token_ids": (4, 5, 6, 7, 8, 9, 10), "ignore_eos": True},
}


def asked(way: dict[str, Any], tokens: int = TOKENS) -> list[Request]:
    params = SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, **way})
    return [Request(str(index), prompt, replace(params, seed=index)) for index, prompt in enumerate([*PROMPTS, *LOOPS])]


def outputs(shards: Path, tp_size: int, requests: list[Request], **settings: Any) -> tuple[list[Output], EngineStats]:
    """Each request's outputs as one, which must be the same on all ranks but for the rounding of log-probabilities."""
    values: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 4, "speculate": "ngram", **settings}

    def rank(group: TPGroup) -> tuple[list[Output], EngineStats]:
        engine = Engine(EngineConfig(shards, tp_size, **values), group)
        parts: dict[str, list[Output]] = {}
        with torch.inference_mode():
            engine.apply(Add(requests))
            while engine.has_work:
                for output in engine.step():
                    parts.setdefault(output.id, []).append(output)
            return [joined(parts[request.id]) for request in requests], engine.stats()

    results = run_ranks(tp_size, rank)
    assert all(stats == results[0][1] for _, stats in results)
    assert all([one.token_ids for one in each] == [one.token_ids for one in results[0][0]] for each, _ in results)
    return results[0]


def joined(parts: list[Output]) -> Output:
    assert all(part.finish_reason is None for part in parts[:-1])
    assert all(part.logprobs is None or len(part.logprobs) == len(part.token_ids) for part in parts)
    reported: list[TokenLogprob] = [one for part in parts for one in part.logprobs or []]
    return parts[-1]._replace(token_ids=[id for part in parts for id in part.token_ids], logprobs=reported or None)


def chances_of_pairs(shards: Path, prompt: list[int], way: SamplingParams) -> tuple[int, dict[tuple[int, ...], float]]:
    """The likeliest token behind the prompt, and the chances of the two behind that, the likeliest second one first, by
    the definitions of temperature and top-k."""

    def chances(tokens: list[int]) -> dict[int, float]:
        request = Request("0", [*prompt, *tokens], SamplingParams(max_tokens=1, logprobs=20))
        (found,), _ = outputs(shards, 1, [request], speculate="off")
        assert found.logprobs is not None
        weights = {id: exp(value / way.temperature) for id, value in found.logprobs[0].top[: way.top_k]}
        return {id: weight / sum(weights.values()) for id, weight in weights.items()}

    first = next(iter(chances([])))
    second = chances([first])
    return first, {(a, b): p * q for a, p in second.items() for b, q in chances([first, a]).items()}


def check_shares(found: list[Output], first: int, expected: dict[tuple[int, ...], float], draws: int) -> None:
    """Chi-square of what follows ``first`` where that was drawn, of nine pairs."""
    pairs = Counter(tuple(one.token_ids[1:]) for one in found if one.token_ids[0] == first)
    assert pairs.keys() == expected.keys()
    total = pairs.total()
    square = sum((pairs[pair] - total * chance) ** 2 / (total * chance) for pair, chance in expected.items())
    assert total > draws / 4 and square < 26.1  # eight degrees of freedom: exceeded once in a thousand
