"""A model's own layer that predicts one token more: what it computes, and that answers stay what they are with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.ranks import run_ranks
from tests.tiny_predicting import PREDICTING, Predicting, make_copying, make_predicting
from tests.unit.generating import SHARED, run
from tests.unit.generating import requests as greedy
from tests.unit.speculating import LOOPS, TOKENS, WAYS, asked, chances_of_pairs, check_shares, outputs
from tpctl.accounting import state_slots
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners.loading import load
from tpctl.engine.runners.predicting import PredictingRunner
from tpctl.engine.runners.runner import ModelRunner
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import MOST_PREDICTED, PredictedDrafter, RowCost
from tpctl.engine.steps.batch import Run, build_runs
from tpctl.layers.batch import SequenceState
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

SIZES = (1, 2, 5)
PAIRS = [*((name, 1) for name in PREDICTING), ("qwen3_next", 2), ("qwen3_5_text", 3), ("qwen3_5_moe_text", 2)]
PAIRS += [("deepseek_v3", 5)]
DAMP = {"qwen3_5_text": 0.12}
"""Of models of whose drafts some hold; mostly 0.03."""
MTP: dict[str, Any] = {"speculate": "mtp"}
PROMPTS = [*(SHARED[:length] for length in (3, 17, 23)), [9, 8, 7], [50] * 13, LOOPS[0], [*SHARED[:20], 77, 78]]
LONG = [SHARED, [*SHARED[5:], 9, 8, 7], LOOPS[0] * 2, [50] * 41]


def kind(name: str) -> str:
    """Of models of one kind a day takes one."""
    return "delta nets" if name.startswith("qwen") else name


@pytest.fixture
def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that as much is drafted, and computed, as can be."""
    monkeypatch.setattr(ModelRunner, "row_cost", RowCost(0, 0))
    monkeypatch.setattr("tpctl.engine.runners.predicting.predicted_cost", lambda cost, blueprint: cost)


@pytest.fixture(scope="module", params=PREDICTING)
def random(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Predicting]:
    """Shards of a model at each size, and the reference."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make_predicting(request.param, folder / "model")
    for size in SIZES:
        shard_checkpoint(folder / "model", folder / f"tp{size}", size)
    return folder, made


def damped(folder: Path, name: str, damp: float, sizes: tuple[int, ...] = (1,)) -> Path:
    """Shards of a model whose drafts hold often."""
    make_copying(name, folder / "model", damp)
    for size in sizes:
        shard_checkpoint(folder / "model", folder / f"tp{size}", size)
    return folder


def predicted(shards: Path, tp_size: int, ids: list[int], more: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Last states of every token of ``ids`` but one; the layer's logits there; and behind, when ``more`` follow."""

    def rank(group: TPGroup) -> tuple[Tensor, Tensor, Tensor]:
        runner = Engine(EngineConfig(shards, tp_size, kv_cache_memory=1 << 20, block_size=4, **MTP), group).runner
        assert isinstance(runner, PredictingRunner)
        sequence = Sequence("0", ids, SamplingParams(), 999)
        sequence.block_tables = (list(range(8, 24)),)
        count, found = len(ids) - 1, []

        def made(states: Tensor, following: list[int], start: int) -> Tensor:
            batch = build_runs([Run(sequence, start, len(following))], following, 4, group.device)
            made = runner.model.predict(states, batch, runner._predictor_kv)
            scores = runner.sampler.whole_rows(runner.model.lm_head(made))[0]
            found.append(scores.transpose(0, 1).flatten(1))
            return made

        with torch.inference_mode():
            batch = build_runs([Run(sequence, 0, count)], ids[:-1], 4, group.device)
            batch.states = [SequenceState(0, None)]
            final = runner.model.final(batch, runner.kv)
            assert final is not None
            last = made(final.x, ids[1:], 0)[-1:]
            for place, token in enumerate(more):
                last = made(last, [token], count + place)
        return final.x, found[0], torch.cat(found[1:])

    results = run_ranks(tp_size, rank)
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))
    return results[0]


@pytest.mark.grid(3, daily=True, alike={"random": kind})
@pytest.mark.parametrize("tp_size", SIZES)
def test_logits_are_those_of_the_published_formula(tp_size: int, random: tuple[Path, Predicting]) -> None:
    folder, reference = random
    ids, more = SHARED[:30], [4, 5, 6]
    states, found, behind = predicted(folder / f"tp{tp_size}", tp_size, ids, more)
    assert states.numpy() == pytest.approx(reference.states(ids[:-1]).numpy(), abs=1e-3)
    following = ids[1:]
    assert _real(found, tp_size) == pytest.approx(reference.logits(reference.step(states, following)).numpy(), abs=1e-4)
    for place, token in enumerate(more):
        states, following = torch.cat((states, reference.step(states, following)[-1:])), [*following, token]
        wanted = reference.logits(reference.step(states, following))[-1]
        assert _real(behind[place : place + 1], tp_size)[0] == pytest.approx(wanted.numpy(), abs=1e-4)


def _real(scores: Tensor, tp_size: int, vocab_size: int = 131) -> Any:
    """The columns of the vocabulary, of those that ranks have gathered, padding as -inf among them."""
    kept = scores[:, ~torch.isinf(scores[0])] if tp_size > 1 else scores[:, :vocab_size]
    assert kept.shape[1] == vocab_size
    return kept.numpy()


def drafted(reference: Predicting, known: list[int], count: int) -> list[int]:
    """What is drafted behind ``known`` by the formula."""
    states, following, found = reference.states(known[:-1]), known[1:], []
    for _ in range(count):
        made = reference.step(states, following)
        found.append(int(reference.logits(made)[-1].argmax()))
        states, following = torch.cat((states, made[-1:])), [*following, found[-1]]
    return found


@pytest.mark.grid(2, daily=True, alike={"random": kind})
@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.usefixtures("rows_cost_nothing")
def test_drafts_are_those_of_the_formula_whatever_came_before(
    crowded: bool, random: tuple[Path, Predicting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, given up and computed again, or behind a prefix that was found: what it keeps is there."""
    folder, reference = random
    kept: dict[tuple[str, int], list[int]] = {}
    plain = PredictedDrafter.keep

    def keep(self: PredictedDrafter, sequence: Sequence, length: int, drafts: list[int]) -> None:
        plain(self, sequence, length, drafts)
        kept[sequence.id, length] = drafts

    monkeypatch.setattr(PredictedDrafter, "keep", keep)
    groups = [greedy("", LONG, max_tokens=60)] if crowded else [greedy(name, LONG[:2], max_tokens=9) for name in "ab"]
    way = {"max_num_seqs": 3 if crowded else 8, "kv_cache_memory": small(folder / "tp1") if crowded else 1 << 22}
    tokens, stats = run(folder / "tp1", 1, groups, max_num_batched_tokens=24, **way, **MTP)
    assert stats.preemptions > 0 if crowded else stats.prefix_cache_hit_tokens > 0
    assert max(map(len, kept.values())) == MOST_PREDICTED
    for request in (request for group in groups for request in group):
        known = [*request.token_ids, *tokens[request.id]]
        likeliest = reference.logits(reference.step(reference.states(known[:-1]), known[1:])).argmax(-1).tolist()
        lengths = [length for name, length in kept if name == request.id]
        assert len(lengths) > 3
        for length in lengths:
            assert kept[request.id, length][0] == likeliest[length - 2], (request.id, length)
        for length in lengths[::11]:
            drafts = kept[request.id, length]
            assert drafts == drafted(reference, known[:length], len(drafts)), (request.id, length)


def small(shards: Path) -> int:
    """Bytes of the least cache that holds 40 blocks and, of three sequences, six states: too few for ``LONG``."""

    def rank(group: TPGroup) -> int:
        loaded = load(EngineConfig(shards, 1, block_size=4, **MTP), group)
        slab, state = loaded.slab_bytes, loaded.state_bytes
        size = 40 * slab
        while size - state_slots(size, state, 3) * state < 40 * slab or 0 < state_slots(size, state, 3) < 6:
            size += slab
        return size

    return run_ranks(1, torch.inference_mode()(rank))[0]


@pytest.mark.grid(1, daily=True, alike={"name": kind})
@pytest.mark.parametrize(("name", "tp_size"), PAIRS)
@pytest.mark.usefixtures("rows_cost_nothing")
def test_a_layer_that_is_right_is_accepted_always(name: str, tp_size: int, tmp_path: Path) -> None:
    shards = damped(tmp_path, name, 0.0, (tp_size,)) / f"tp{tp_size}"
    requests = greedy("", PROMPTS[:4], max_tokens=TOKENS // min(2, tp_size))
    plain, _ = run(shards, tp_size, [requests])
    tokens, stats = run(shards, tp_size, [requests], kv_cache_memory=1 << 22, **MTP)
    assert tokens == plain
    assert stats.accepted_tokens == stats.draft_tokens > TOKENS
    assert stats.steps < TOKENS / 2


@pytest.mark.grid(1, daily=True, alike={"name": kind})
@pytest.mark.parametrize(("name", "tp_size"), PAIRS)
@pytest.mark.usefixtures("rows_cost_nothing")
def test_greedy_tokens_are_those_without(name: str, tp_size: int, tmp_path: Path) -> None:
    """Of drafts some hold and some do not; together, and with prefixes that were computed before."""
    shards = damped(tmp_path, name, DAMP.get(name, 0.03), (tp_size,)) / f"tp{tp_size}"
    prompts = [*PROMPTS, *LONG] if tp_size == 1 else PROMPTS[-3:]
    groups = [greedy("", prompts, max_tokens=TOKENS // tp_size), greedy("next ", prompts[-2:], max_tokens=9)]
    plain, without = run(shards, tp_size, groups, kv_cache_memory=1 << 22)
    tokens, stats = run(shards, tp_size, groups, kv_cache_memory=1 << 22, **MTP)
    assert tokens == plain
    assert without.draft_tokens == 0
    assert stats.draft_tokens > stats.accepted_tokens > stats.draft_tokens / 50  # by chance one in 131
    assert stats.prefix_cache_hit_tokens > 0


@pytest.mark.grid(1, daily=True, alike={"name": kind})
@pytest.mark.parametrize("name", PREDICTING)
@pytest.mark.usefixtures("rows_cost_nothing")
def test_greedy_tokens_are_those_without_in_chunks_and_given_up(name: str, tmp_path: Path) -> None:
    shards = damped(tmp_path, name, DAMP.get(name, 0.03)) / "tp1"
    requests = greedy("", LONG, max_tokens=75)
    plain, _ = run(shards, 1, [requests])
    crowded = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "kv_cache_memory": small(shards)}
    tokens, stats = run(shards, 1, [requests], **crowded, **MTP)
    assert tokens == plain
    assert stats.preemptions > 0 < stats.accepted_tokens


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damped(tmp_path_factory.mktemp("partly"), "glm4_moe", 0.03, (1, 2))


@pytest.mark.parametrize(("tp_size", "way"), [*((1, way) for way in WAYS), (2, "nucleus"), (2, "penalties")])
@pytest.mark.usefixtures("rows_cost_nothing")
def test_answers_are_those_without(tp_size: int, way: str, partly: Path) -> None:
    shards, requests = partly / f"tp{tp_size}", asked(WAYS[way])
    plain, _ = outputs(shards, tp_size, requests, speculate="off")
    found, stats = outputs(shards, tp_size, requests, kv_cache_memory=1 << 21, **MTP)
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    for one, other in zip(found, plain, strict=True):
        assert one._replace(logprobs=None) == other._replace(logprobs=None)
        for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.usefixtures("rows_cost_nothing")
def test_the_shares_of_sampled_tokens_are_those_of_the_distribution(partly: Path) -> None:
    """Chi-square of the second and third token over many seeds."""
    prompt, draws = [5, 6, 7, 8] * 2, 3000
    way = SamplingParams(temperature=1.5, top_k=3, max_tokens=3, ignore_eos=True)

    first, expected = chances_of_pairs(partly / "tp1", prompt, way)
    requests = [Request(str(seed), prompt, replace(way, seed=seed)) for seed in range(draws)]
    found, stats = outputs(partly / "tp1", 1, requests, max_num_batched_tokens=2048, kv_cache_memory=1 << 24, **MTP)
    assert stats.draft_tokens > stats.accepted_tokens > draws / 10
    check_shares(found, first, expected, draws)


@pytest.mark.usefixtures("rows_cost_nothing")
def test_what_is_not_finite(tmp_path: Path) -> None:
    """A request ends, and neither it nor a broken layer spoils others' answers."""
    make_copying("glm4_moe", tmp_path / "model", 0.03)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][77] = float("nan")
    tensors["lm_head.weight"][77] = 0.0
    save_file(tensors, path, {"format": "pt"})
    shard_checkpoint(tmp_path / "model", tmp_path / "tp1", 1)
    requests = greedy("", [[5, 77, 6], *LONG[:2], [9, 8, 77]], max_tokens=12)
    found, stats = outputs(tmp_path / "tp1", 1, requests, kv_cache_memory=1 << 15, **MTP)
    assert [one.finish_reason for one in found] == ["error", "length", "length", "error"]
    assert stats.accepted_tokens > 0
    plain, _ = outputs(tmp_path / "tp1", 1, requests, speculate="off")
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]

    tensors["model.layers.3.enorm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    shard_checkpoint(tmp_path / "model", tmp_path / "broken", 1)
    again, stats = outputs(tmp_path / "broken", 1, requests, **MTP)
    assert [one.token_ids for one in again] == [one.token_ids for one in plain]
    assert stats.draft_tokens == 0
