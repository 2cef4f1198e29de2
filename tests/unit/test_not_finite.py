"""Logits that are NaN or infinite: an error for that request, and the same tokens as ever for all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_broken
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.sampling.sampler import Sampler, SamplingRow
from tpctl.engine.scheduling.sequence import NOT_FINITE
from tpctl.engine.scheduling.token_counts import TokenCounts
from tpctl.kernels.common import noise
from tpctl.partition.cuts import Range, Vocab
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Abort, Add, Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

NAN, INF = float("nan"), float("inf")
VOCAB = 131
BROKEN = 99
"""The token whose embedding is NaN."""
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.3, "top_k": 5, "seed": 2},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 3},
    {"temperature": 1.0, "min_p": 0.2, "seed": 4},
    {"temperature": 0.9, "repetition_penalty": 1.3, "seed": 5},
    {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logprobs": 2},
    {"min_tokens": 8},
]


def test_the_engine_and_its_kernels_mean_the_same() -> None:
    assert NOT_FINITE == noise.NOT_FINITE < -1  # which is a peer that was lost


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_row_that_is_not_finite_has_no_token(way: dict[str, Any], tp_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 700)
    logits[1, 3] = logits[2, 699] = logits[7, 300] = NAN  # on the first, the last and a middle rank
    logits[3, 500] = INF
    logits[4] = -INF
    logits[5, 10:] = -INF
    logits[6, 600] = -INF
    slices = Vocab().ranges(700, tp_size)
    padded = torch.nn.functional.pad(logits, (0, slices[-1].stop - 700), value=NAN)  # padding is not looked at
    counts = TokenCounts(2).follow([1, 2, 3, 699])
    rows = [SamplingRow(SamplingParams(**way), 9, counts, banned=[7] * ("min_tokens" in way))] * 8

    def rank(group: TPGroup) -> list[int]:
        held = slices[group.rank]
        return Sampler(group, slices, 700).sample(padded[:, held.start : held.stop], rows)[0]

    found = run_ranks(tp_size, rank)
    assert all(tokens == found[0] for tokens in found)
    assert [token == NOT_FINITE for token in found[0]] == [False, True, True, True, True, False, False, True]
    clean, _ = Sampler(TPGroup(), [Range(0, 700)], 700).sample(logits[[0, 5, 6]], rows[:3])
    assert [found[0][row] for row in (0, 5, 6)] == clean


@pytest.mark.parametrize("place", [0, 255, 256, 699])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_are_looked_at_whole(place: int, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 700).to(dtype)
    logits[0, place] = NAN
    tokens, _ = Sampler(TPGroup(), [Range(0, 700)], 700).sample(logits, [SamplingRow(SamplingParams(), 5)] * 2)
    assert tokens == [NOT_FINITE, int(logits[1].argmax())]


def make_shards(folder: Path, tp_size: int, broken: int, sampled: bool = False) -> Path:
    make_broken("llama2", folder / "hf", broken, sampled=sampled)
    shard_checkpoint(folder / "hf", folder / "shards", tp_size)
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {tp: make_shards(tmp_path_factory.mktemp(f"tp{tp}"), tp, BROKEN) for tp in (1, 2)}


class Run:
    """Engines on every rank; what they answered, by request."""

    def __init__(self, shards: Path, tp_size: int, **settings: Any) -> None:
        values: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 4, "max_num_batched_tokens": 64, **settings}
        self.config = EngineConfig(shards, tp_size, **values)

    def __call__(self, *groups: Sequence[Request] | Sequence[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Requests group by group, each to its end; a group of ids instead lets the one before have a single step, and
        aborts these of it."""

        def rank(group: TPGroup) -> tuple[dict[str, list[int]], dict[str, str]]:
            tokens: dict[str, list[int]] = {}
            errors: dict[str, str] = {}

            def take(outputs: list[Output]) -> None:
                for output in outputs:
                    tokens.setdefault(output.id, []).extend(output.token_ids)
                    assert output.finish_reason != "error" or output.id not in errors
                    if output.finish_reason == "error":
                        errors[output.id] = output.message or ""

            with torch.inference_mode():
                engine = Engine(self.config, group)
                for index, entries in enumerate(groups):
                    requests = [entry for entry in entries if isinstance(entry, Request)]
                    ids = [entry for entry in entries if isinstance(entry, str)]
                    take(engine.apply(Add(requests)))
                    take(engine.apply(Abort(ids)))
                    if index + 1 < len(groups) and any(isinstance(entry, str) for entry in groups[index + 1]):
                        take(engine.step())
                        continue
                    while engine.has_work:
                        take(engine.step())
                engine.stats()  # checks the books
            return tokens, errors

        results = run_ranks(self.config.tp_size, rank)
        assert all(result == results[0] for result in results)
        return results[0]


def request(id: str, prompt: list[int], **way: Any) -> Request:
    return Request(id, prompt, SamplingParams(**{"max_tokens": 9, "ignore_eos": True, **way}))


PREFIX = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def mixed(broken: bool) -> list[Request]:
    """Of each way to sample two requests with a common beginning; with ``broken``, one that shares it fails."""
    found = []
    for index, way in enumerate(WAYS):
        if broken:
            found.append(request(f"broken {index}", [*PREFIX, 20 + index, BROKEN, 3], **way))
        found.append(request(f"shared {index}", [*PREFIX, 40 + index], **way))
        found.append(request(f"apart {index}", [30 + index, 31, 32], **way))
    return found


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}], ids=["whole", "chunks"])
def test_other_requests_of_the_batch_go_on(tp_size: int, settings: dict[str, Any], shards: dict[int, Path]) -> None:
    run = Run(shards[tp_size], tp_size, **settings)
    want, none = run(mixed(False))
    assert not none
    assert all(len(tokens) == 9 for tokens in want.values())
    # Once more in the same engine: blocks that hold NaN are found by nobody, and harm nobody who is given them.
    again = [Request(f"again {r.id}", r.token_ids, r.sampling) for r in mixed(False)]
    tokens, errors = run(mixed(True), again)
    assert sorted(errors) == sorted(f"broken {index}" for index in range(len(WAYS)))
    assert all(message.startswith("the model's logits are not finite at position 12: ") for message in errors.values())
    assert {id: tokens[id] for id in want} == want
    assert {id: tokens[f"again {id}"] for id in want} == want


def test_blocks_of_requests_that_were_given_up_are_harmless(shards: dict[int, Path]) -> None:
    """Nothing is sampled from them, so nobody hears that they hold NaN."""
    clean = [request(f"clean {index}", [30 + index, 31, 32][: 1 + index % 3], max_tokens=40) for index in range(6)]
    # Memory for 32 blocks: those of the first are given to the others too.
    settings = {"kv_cache_memory": 32 * 6144, "max_num_batched_tokens": 16, "max_num_seqs": 16}
    run = Run(shards[1], 1, **settings)
    want, _ = run(clean)
    long = [3, BROKEN, *range(4, 90)]
    tokens, errors = run([request("given up", long)], ["given up"], clean)
    assert not errors
    assert {id: tokens[id] for id in want} == want
    # Who asks for the very same tokens is told.
    _, errors = run([request("given up", long)], ["given up"], [request("asked", [*long, 5])])
    assert list(errors) == ["asked"]


def test_a_token_that_breaks_the_next_step(tmp_path: Path, shards: dict[int, Path]) -> None:
    first = Run(shards[1], 1)([request("a", PREFIX)])[0]["a"]
    broken = first[2]
    assert broken not in first[:2]
    assert broken not in PREFIX
    tokens, errors = Run(make_shards(tmp_path, 1, broken, sampled=True), 1)([request("a", PREFIX)])
    assert tokens == {"a": first[:3]}
    assert errors["a"].startswith(f"the model's logits are not finite at position {len(PREFIX) + 3}: its weights")
