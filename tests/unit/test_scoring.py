"""Scores of a prompt's own tokens: transformers' log-probabilities and torch's divergences, however it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.unit.scoring import LENGTHS, VOCAB, Models
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.sampling import scores as engine_scores
from tpctl.wire.messages import Abort, Add, Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.scoring import Scoring, TokenScore
from tpctl.wire.settings import EngineConfig

FIRSTS = (1, 4, 23 - 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("scored"))


def scored(
    shards: Path, tp_size: int, requests: list[Request], between: Any = None, **settings: Any
) -> dict[str, list[TokenScore]]:
    """What comes of requests that are computed together."""
    config = EngineConfig(shards, tp_size, **{"kv_cache_memory": 1 << 21, "block_size": 4, **settings})

    def rank(group: TPGroup) -> dict[str, Output]:
        last: dict[str, Output] = {}
        with torch.inference_mode():
            engine = Engine(config, group)
            engine.apply(Add(requests))
            while engine.has_work:
                for output in engine.step():
                    assert output.scores is None or output.finish_reason == "length"
                    last[output.id] = output
                if between is not None:
                    between(engine)
            engine.stats()
        return last

    first, *others = run_ranks(tp_size, rank)
    assert all(other == first for other in others)
    assert all(output.finish_reason == "length" for output in first.values()), first
    return {id: output.scores or [] for id, output in first.items()}


def requests_of(models: Models, **scoring: Any) -> list[Request]:
    params, row, found = SamplingParams(max_tokens=1, ignore_eos=True), 0, []
    for index, (prompt, first) in enumerate(zip(models.prompts, FIRSTS, strict=True)):
        found.append(Request(str(index), prompt, params, Scoring(first, row, **scoring)))
        row += len(prompt) - first
    return found


ROWS = sum(LENGTHS) - sum(FIRSTS)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"kv_cache_memory": 11 * 4 * 2 * 3 * 8 * 8 * 4, "max_model_len": 41},  # room for one at a time
    ],
    ids=["whole", "chunked", "token by token", "small cache"],
)
def test_logprobs_are_transformers(
    models: Models, tp_size: int, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_scores, "ELEMENTS", 5 * VOCAB)  # a few rows at a time
    check_logprobs(models, "whole", tp_size, settings)


@pytest.mark.parametrize(("tp_size", "tokens"), [(1, 4096), (2, 7)])
def test_logprobs_of_a_model_with_recurrent_layers(models: Models, tp_size: int, tokens: int) -> None:
    check_logprobs(models, "recurrent", tp_size, {"max_num_batched_tokens": tokens, "max_num_seqs": 3})


def check_logprobs(models: Models, name: str, tp_size: int, settings: dict[str, int]) -> None:
    found = scored(models.shards(name, tp_size), tp_size, requests_of(models), **settings)
    for index, (prompt, first) in enumerate(zip(models.prompts, FIRSTS, strict=True)):
        chosen = models.logprobs(name, prompt)[range(len(prompt) - 1), prompt[1:]][first - 1 :]
        scores = found[str(index)]
        torch.testing.assert_close(torch.tensor([s.logprob for s in scores]).double(), chosen, rtol=0, atol=1e-4)
        assert {(score.divergence, score.same_top) for score in scores} == {(None, None)}


@pytest.mark.parametrize(("tp_size", "other"), [(1, 1), (1, 2), (3, 2), (2, 7)])
def test_divergences_are_torchs(models: Models, tp_size: int, other: int, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    with file.open("wb") as stream:
        stream.truncate(4 * ROWS * VOCAB)
    scored(models.shards("whole", tp_size), tp_size, requests_of(models, rows=ROWS, keep=str(file)))
    kept = torch.from_numpy(np.fromfile(file, dtype=np.float32).reshape(ROWS, VOCAB)).double()
    wanted = [models.logprobs("whole", p)[first - 1 :] for p, first in zip(models.prompts, FIRSTS, strict=True)]
    torch.testing.assert_close(kept, torch.cat(wanted), rtol=0, atol=1e-4)
    against = requests_of(models, rows=ROWS, against=str(file))
    found = scored(models.shards("disturbed", other), other, against, max_num_batched_tokens=9, max_num_seqs=2)
    for index, (prompt, first, p) in enumerate(zip(models.prompts, FIRSTS, wanted, strict=True)):
        q = models.logprobs("disturbed", prompt)[first - 1 :]
        divergences = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        scores = found[str(index)]
        got = torch.tensor([score.divergence for score in scores]).double()
        torch.testing.assert_close(got, divergences, rtol=1e-4, atol=1e-6)
        assert [score.same_top for score in scores] == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert {score.same_top for scores in found.values() for score in scores} == {True, False}


@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_model_does_not_differ_from_itself(models: Models, tp_size: int, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    with file.open("wb") as stream:
        stream.truncate(4 * ROWS * VOCAB)
    shards = models.shards("whole", tp_size)
    scored(shards, tp_size, requests_of(models, rows=ROWS, keep=str(file)))
    found = scored(shards, tp_size, requests_of(models, rows=ROWS, against=str(file)))
    assert {(score.divergence, score.same_top) for scores in found.values() for score in scores} == {(0.0, True)}
    across = scored(models.shards("whole", 2), 2, requests_of(models, rows=ROWS, against=str(file)))
    assert all(abs(score.divergence or 0) < 1e-6 for scores in across.values() for score in scores)


def test_scores_survive_a_preemption_and_other_requests(models: Models) -> None:
    """A prompt that was computed before is computed again: what the prefix cache spares has no logits."""
    prompt = models.prompts[0]
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    requests = [
        Request("before", prompt, SamplingParams(max_tokens=60, ignore_eos=True)),
        Request("scored", prompt, params, Scoring(1)),
    ]
    preempted = []

    def between(engine: Engine) -> None:
        sequence = engine.scheduler.running.get("scored")
        if sequence is not None and sequence.num_computed_tokens > 20 and not preempted:
            preempted.append(sequence)
            engine.scheduler._preempt(sequence)

    config = {"max_num_batched_tokens": 7, "max_num_seqs": 2}
    found = scored(models.shards("whole", 1), 1, requests, between, **config)
    assert preempted
    chosen = models.logprobs("whole", prompt)[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(torch.tensor([s.logprob for s in found["scored"]]).double(), chosen, rtol=0, atol=1e-4)
    assert found["before"] == []


def test_an_aborted_request_has_no_scores(models: Models) -> None:
    config = EngineConfig(
        models.shards("whole", 1), 1, kv_cache_memory=1 << 21, block_size=4, max_num_batched_tokens=5, max_num_seqs=2
    )
    with torch.inference_mode():
        engine = Engine(config, TPGroup())
        engine.apply(Add(requests_of(models)[:1]))
        engine.step()
        assert engine.apply(Abort(["0"])) == [Output("0", [], "abort")]
        assert not engine.has_work
