"""Log-probabilities of a prompt's own tokens: transformers', however the prompt is computed, and told once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.unit.scoring import LENGTHS, Models
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.sampling import scores as engine_scores
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

TOP = 4
SMALL_CACHE = {"kv_cache_memory": 14 * 4 * 2 * 3 * 8 * 8 * 4, "max_model_len": 52, "max_num_batched_tokens": 24}
"""Room for one long sequence and a short one, in a tiny model."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("prompts"))


def serve(
    models: Models, tp_size: int, groups: list[list[Request]], **settings: Any
) -> tuple[dict[str, list[Output]], Any]:
    """What comes of requests, group after group; and the engine's counters."""
    values: dict[str, Any] = {"kv_cache_memory": 1 << 21, "block_size": 4, "max_num_seqs": 6, **settings}
    config = EngineConfig(models.shards("whole", tp_size), tp_size, **values)

    def rank(group: TPGroup) -> tuple[dict[str, list[Output]], Any]:
        found: dict[str, list[Output]] = {}
        with torch.inference_mode():
            engine = Engine(config, group)
            for requests in groups:
                engine.apply(Add(requests))
                while engine.has_work:
                    for output in engine.step():
                        found.setdefault(output.id, []).append(output)
            return found, engine.stats()

    first, *others = run_ranks(tp_size, rank)
    assert all(found == first[0] for found, _ in others)
    assert all(outputs[-1].finish_reason == "length" for outputs in first[0].values())
    return first


def asked(models: Models, prefix: str = "", **params: Any) -> list[Request]:
    sampling = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
    return [Request(f"{prefix}{index}", prompt, sampling) for index, prompt in enumerate(models.prompts)]


def check(models: Models, index: int, outputs: list[Output], top: int) -> None:
    """Told with the first token, each as transformers has it."""
    assert [output.prompt_logprobs is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)
    told, prompt = outputs[0].prompt_logprobs, models.prompts[index]
    assert told is not None and len(told) == LENGTHS[index] - 1
    wanted = models.logprobs("whole", prompt)
    for place, (one, row) in enumerate(zip(told, wanted, strict=True), start=1):
        assert one.logprob == pytest.approx(float(row[prompt[place]]), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert [float(row[id]) for id, _ in one.top] == pytest.approx([value for _, value in one.top], abs=1e-4)
        assert len({id for id, _ in one.top}) == top


@pytest.mark.daily(2)
@pytest.mark.parametrize("tp_size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 1, "max_num_seqs": 1}, SMALL_CACHE],
    ids=["whole", "chunked", "token by token", "small cache"],
)
def test_log_probabilities_are_transformers(
    models: Models, tp_size: int, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_scores, "ELEMENTS", 5 * 131)  # a few rows at a time
    plain, _ = serve(models, 1, [asked(models)])
    outputs, stats = serve(models, tp_size, [asked(models, prompt_logprobs=TOP)], **settings)
    for index in range(len(LENGTHS)):
        check(models, index, outputs[str(index)], TOP)
        told = [id for output in outputs[str(index)] for id in output.token_ids]
        assert told == [id for output in plain[str(index)] for id in output.token_ids]
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_prefix_cache_spares_nothing_of_them_and_what_others_find_is_whole(models: Models, tp_size: int) -> None:
    groups = [asked(models, "before "), asked(models, "asked ", prompt_logprobs=TOP), asked(models, "after ")]
    outputs, _ = serve(models, tp_size, groups)
    for index in range(len(LENGTHS)):
        check(models, index, outputs[f"asked {index}"], TOP)
        assert outputs[f"asked {index}"][0].num_cached_tokens == 0
        tokens = [[id for o in outputs[f"{way} {index}"] for id in o.token_ids] for way in ("before", "asked", "after")]
        assert tokens[0] == tokens[1] == tokens[2]
    assert outputs["after 0"][0].num_cached_tokens > 0


def test_a_sequence_that_gives_up_its_blocks_tells_them_once(models: Models) -> None:
    params: dict[str, Any] = {"max_tokens": 20, "prompt_logprobs": 0}
    settings = {**SMALL_CACHE, "max_model_len": 64, "kv_cache_memory": 17 * 4 * 2 * 3 * 8 * 8 * 4}
    outputs, stats = serve(models, 1, [asked(models, **params)], **settings)
    assert stats.preemptions > 0
    for index in range(len(LENGTHS)):
        check(models, index, outputs[str(index)], 0)


def test_a_prompt_of_one_token_has_none(models: Models) -> None:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=3, logprobs=1)
    outputs, _ = serve(models, 2, [[Request("x", [5], sampling)]])
    assert outputs["x"][0].prompt_logprobs == [] and len(outputs["x"][0].logprobs or ()) == 1
