"""Engines of real layers answer with speculation what they answer without: greedily, sampled, with what a request may
ask for besides, crowded, in chunks and at several ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint, make_mixture
from tests.unit.generating import PROMPTS, run
from tests.unit.generating import requests as greedy
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners.runner import ModelRunner
from tpctl.engine.scheduling.ngram import Match
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import RowCost
from tpctl.sharding.cutting.shard import shard_checkpoint
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


@pytest.fixture(autouse=True)
def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all that is proposed is computed."""
    monkeypatch.setattr(ModelRunner, "row_cost", RowCost(0, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculation")
    make_checkpoint("smollm2", folder / "model")
    for size in (1, 2, 3):
        shard_checkpoint(folder / "model", folder / f"tp{size}", size)
    return folder


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


@pytest.mark.daily(2)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_answers_are_those_without(way: dict[str, Any], tp_size: int, model: Path) -> None:
    shards, requests = model / f"tp{tp_size}", asked(way)
    plain, without = outputs(shards, tp_size, requests, speculate="off")
    found, stats = outputs(shards, tp_size, requests)
    assert without.draft_tokens == 0 < stats.accepted_tokens < stats.draft_tokens
    for one, other in zip(found, plain, strict=True):
        assert one._replace(logprobs=None) == other._replace(logprobs=None)
        assert (one.logprobs is None) == (other.logprobs is None)
        for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in theirs.top], abs=1e-4)


@pytest.mark.parametrize("tp_size", [1, 3])
def test_crowded_and_in_chunks(tp_size: int, model: Path) -> None:
    shards, requests = model / f"tp{tp_size}", asked({})
    tokens, wide = run(shards, tp_size, [requests])
    memory = (1 << 20) // wide.num_blocks * 24
    crowded = {"kv_cache_memory": memory, "max_num_batched_tokens": 10, "max_num_seqs": 6, "speculate": "ngram"}
    found, stats = run(shards, tp_size, [requests], **crowded)
    assert found == tokens
    assert stats.preemptions > 0 and stats.accepted_tokens > 0


def test_the_next_turn_finds_what_was_accepted(model: Path) -> None:
    first = Request("0", LOOPS[0], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    tokens, _ = run(model / "tp1", 1, [[first]], speculate="ngram")
    turn = [*first.token_ids, *tokens["0"], 3, 4, 5]
    second = Request("1", turn, first.sampling)
    both, stats = run(model / "tp1", 1, [[first], [second]], speculate="ngram")
    alone, _ = run(model / "tp1", 1, [[second]])
    assert both["1"] == alone["1"]
    assert stats.prefix_cache_hit_tokens == (len(first.token_ids) + TOKENS - 1) // 4 * 4


class Knowing:
    """Proposes what was answered without it, and something else at each fifth place."""

    answers: ClassVar[dict[str, list[int]]] = {}

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        at = len(sequence.token_ids) - sequence.num_prompt_tokens
        coming = enumerate(self.answers[sequence.id][at:][:most], at)
        tokens = [token + 1 if place % 5 == 4 else token for place, token in coming]
        return Match(tokens, 8) if tokens else None

    def forget(self, sequence: Sequence) -> None:
        pass


@pytest.mark.parametrize(("name", "tp_size"), [("qwen3_next", 2), ("qwen3_5_text", 1), ("deepseek_v3", 2)])
def test_recurrent_layers_and_latent_attention(
    name: str, tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mixture(name, tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)
    asked_for = greedy("", [*LOOPS, PROMPTS[3]], max_tokens=TOKENS)
    tokens, _ = run(tmp_path / "shards", tp_size, [asked_for])
    monkeypatch.setattr(Knowing, "answers", tokens)
    monkeypatch.setattr("tpctl.engine.engine.NgramDrafter", Knowing)
    found, stats = run(tmp_path / "shards", tp_size, [asked_for], speculate="ngram")
    assert found == tokens
    assert TOKENS < stats.accepted_tokens < stats.draft_tokens
    assert stats.steps < TOKENS / 3


def test_the_next_turn_goes_on_from_a_state_inside_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mixture("qwen3_5_text", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 1)
    (first,) = greedy("", LOOPS[:1], max_tokens=TOKENS)
    tokens, _ = run(tmp_path / "shards", 1, [[first]])
    (second,) = greedy("next ", [[*first.token_ids, *tokens["0"], 3, 4, 5]], max_tokens=TOKENS)
    expected, _ = run(tmp_path / "shards", 1, [[second]])
    monkeypatch.setattr(Knowing, "answers", {**tokens, **expected})
    monkeypatch.setattr("tpctl.engine.engine.NgramDrafter", Knowing)
    found, stats = run(tmp_path / "shards", 1, [[first], [second]], speculate="ngram")
    assert found == {**tokens, **expected}
    assert stats.prefix_cache_hit_tokens > len(first.token_ids) + TOKENS - 12


class Always:
    """Proposes the same tokens to every sequence."""

    tokens: tuple[int, ...] = ()

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        return Match(list(self.tokens), 8)

    def forget(self, sequence: Sequence) -> None:
        pass


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


def test_the_shares_of_sampled_tokens_are_those_of_the_distribution(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square of the second and third token over many seeds, the likeliest second one being proposed."""
    prompt, draws = [5, 6, 7, 8] * 2, 3000
    way = SamplingParams(temperature=0.7, top_k=3, max_tokens=3, ignore_eos=True)

    first, expected = chances_of_pairs(model / "tp1", prompt, way)
    monkeypatch.setattr(Always, "tokens", (next(iter(expected))[0], 3))
    monkeypatch.setattr("tpctl.engine.engine.NgramDrafter", Always)
    requests = [Request(str(seed), prompt, replace(way, seed=seed)) for seed in range(draws)]
    found, stats = outputs(model / "tp1", 1, requests, max_num_batched_tokens=2048, kv_cache_memory=1 << 23)
    assert stats.draft_tokens > stats.accepted_tokens > draws / 4
    check_shares(found, first, expected, draws)
