"""Engines of real layers answer with speculation what they answer without: greedily, sampled, with what a request may
ask for besides, crowded, in chunks and at several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.tiny import make_checkpoint, make_mixture
from tests.unit.generating import PROMPTS, run
from tests.unit.generating import requests as greedy
from tests.unit.speculating import LOOPS, TOKENS, WAYS, asked, chances_of_pairs, check_shares, outputs
from tpctl.engine.runners.runner import ModelRunner
from tpctl.engine.scheduling.ngram import Match
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import RowCost
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams


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
