"""The demo model's real weights: tokens equal transformers', whatever the batch, the memory and the number of ranks.

Fewer and shorter answers than with ``--whole-grid``, the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.distributed.real_answers import TEXTS, Tokens, collect, run_in_threads
from tpctl.checkpoint.sources import ResolvedSource, resolve
from tpctl.client.engine_client import EngineClient
from tpctl.client.tokenizer import Tokenizer
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Request
from tpctl.wire.report import EngineStats
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = pytest.mark.slow

PROMPT_LENGTH, SAMPLED_LENGTH = 12, 10
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "seed": 11},
    {"temperature": 1.0, "seed": 12, "top_p": 0.8, "top_k": 40},
    {"temperature": 1.2, "seed": 13, "min_p": 0.05},
    {"temperature": 0.7, "seed": 14, "repetition_penalty": 1.3, "top_k": 20},
)


@pytest.fixture(scope="module")
def greedy_length(pytestconfig: pytest.Config) -> int:
    """Tokens of a greedy answer."""
    return 48 if pytestconfig.getoption("--whole-grid") else 24


@pytest.fixture(scope="module")
def prompts(demo: ResolvedSource) -> list[list[int]]:
    """Eight prompts of equal length, so that transformers needs no padding."""
    tokenizer = Tokenizer(demo.folder)
    found = [tokenizer.encode(text)[:PROMPT_LENGTH] for text in TEXTS]
    assert {len(ids) for ids in found} == {PROMPT_LENGTH}
    return found


@pytest.fixture(scope="module")
def expected(demo: ResolvedSource, prompts: list[list[int]], greedy_length: int) -> list[list[int]]:
    """What transformers' own ``generate`` answers, greedily and in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all tokens, as ignore_eos below
    ids = torch.tensor(prompts)
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=greedy_length, do_sample=False)
    assert answers.shape == (len(prompts), PROMPT_LENGTH + greedy_length)
    return answers[:, PROMPT_LENGTH:].tolist()


def engine_config(demo: ResolvedSource, tp_size: int, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 64 << 20, "block_size": 16, **changes}
    return EngineConfig(ensure_sharded(demo, tp_size), tp_size, **values)


def greedy_requests(prompts: list[list[int]], length: int) -> list[Request]:
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    return [Request(f"greedy {n}", ids, params) for n, ids in enumerate(prompts)]


def sampled_requests(prompts: list[list[int]], prefix: str) -> list[Request]:
    return [
        Request(f"{prefix} {n}", ids, SamplingParams(max_tokens=SAMPLED_LENGTH, ignore_eos=True, **sampling))
        for n, (ids, sampling) in enumerate(zip(prompts, SAMPLINGS, strict=False))
    ]


def run_in_processes(config: EngineConfig, groups: Sequence[Sequence[Request]]) -> tuple[Tokens, EngineStats]:
    tokens: Tokens = {}
    with EngineClient(config) as client:
        for requests in groups:
            client.submit(requests)
            left = len(requests)
            while left:
                left -= collect(tokens, client.outputs())
        return tokens, client.stats()


@pytest.fixture(scope="module")
def sampled_by_ranks(
    demo: ResolvedSource, prompts: list[list[int]], request: pytest.FixtureRequest
) -> dict[int, Tokens]:
    """For some tensor-parallel sizes, sampled answers, alone and together, and what is likeliest: of two of the model's
    layers, and of all with ``--whole-grid``."""
    whole = request.config.getoption("--whole-grid")
    model = demo if whole else resolve(request.getfixturevalue("small"))
    groups: list[list[Request]] = [greedy_requests(prompts, SAMPLED_LENGTH)]
    groups += [[request] for request in sampled_requests(prompts, "alone")]
    company = [Request(f"company {n}", ids, SamplingParams(max_tokens=9)) for n, ids in enumerate(prompts)]
    groups.append([*company[:3], *sampled_requests(prompts, "together"), *company[3:]])
    return {tp_size: run_in_threads(engine_config(model, tp_size), groups)[0] for tp_size in (1, 2, 3)}


@pytest.mark.parametrize("tp_size", [1, 3])
def test_greedy_tokens_equal_transformers(
    demo: ResolvedSource, prompts: list[list[int]], expected: list[list[int]], tp_size: int, greedy_length: int
) -> None:
    """Two ranks are the processes below."""
    tokens, _ = run_in_threads(engine_config(demo, tp_size), [greedy_requests(prompts, greedy_length)])
    assert [tokens[f"greedy {n}"] for n in range(len(expected))] == expected


def test_greedy_tokens_of_two_crowded_processes_equal_transformers(
    demo: ResolvedSource, prompts: list[list[int]], expected: list[list[int]], greedy_length: int
) -> None:
    # 12 blocks of 16 tokens, 480 KiB each on rank 0: not enough for eight answers, each of which wants 3 or 4.
    config = engine_config(demo, 2, kv_cache_memory=6 << 20)
    tokens, stats = run_in_processes(config, [greedy_requests(prompts, greedy_length)])
    assert [tokens[f"greedy {n}"] for n in range(len(expected))] == expected
    assert stats.num_blocks == stats.free_blocks == 12
    assert stats.preemptions > 0
    assert stats.evictions > 0
    assert stats.generated_tokens == len(prompts) * greedy_length


@pytest.mark.parametrize("tp_size", [5, 9])
def test_greedy_tokens_of_more_ranks_than_kv_heads_equal_transformers(
    demo: ResolvedSource,
    prompts: list[list[int]],
    expected: list[list[int]],
    tp_size: int,
    greedy_length: int,
    pytestconfig: pytest.Config,
) -> None:
    """Threads, which start at once, and processes with ``--whole-grid``."""
    whole = pytestconfig.getoption("--whole-grid")
    if tp_size == 9 and not whole:
        pytest.skip("a size of --whole-grid")
    length = greedy_length if tp_size == 5 else greedy_length // 3  # where processes outnumber cores, a step takes long
    runs = run_in_processes if whole else run_in_threads
    tokens, stats = runs(engine_config(demo, tp_size), [greedy_requests(prompts, length)])
    assert [tokens[f"greedy {n}"] for n in range(len(expected))] == [answer[:length] for answer in expected]
    assert stats.generated_tokens == len(prompts) * length


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["alone", "together"])
def test_a_seed_gives_the_same_tokens_in_any_batch_on_any_ranks(
    sampled_by_ranks: dict[int, Tokens], tp_size: int, kind: str
) -> None:
    answers = [sampled_by_ranks[1][f"alone {n}"] for n in range(len(SAMPLINGS))]
    assert [sampled_by_ranks[tp_size][f"{kind} {n}"] for n in range(len(SAMPLINGS))] == answers
    assert all(len(answer) == SAMPLED_LENGTH for answer in answers)
    greedy = [sampled_by_ranks[1][f"greedy {n}"][:SAMPLED_LENGTH] for n in range(len(SAMPLINGS))]
    assert not any(answer == plain for answer, plain in zip(answers, greedy, strict=True))


INTRODUCTION = "The following is a short note from the diary of a sailor who crossed the ocean. "
LONG = {"max_tokens": 48, "ignore_eos": True}
LINES: list[tuple[str, dict[str, Any]]] = [
    (f"{INTRODUCTION if n % 2 else ''}Day {n}: {TEXTS[n % 8]}", LONG if n < 4 else {"max_tokens": 2}) for n in range(64)
]


def test_64_prompts_together_equal_one_at_a_time(demo: ResolvedSource, request: pytest.FixtureRequest) -> None:
    """Of two of the model's layers, and of all with ``--whole-grid``."""
    whole = request.config.getoption("--whole-grid")
    model = demo if whole else resolve(request.getfixturevalue("small"))
    tokenizer = Tokenizer(demo.folder)
    requests = [
        Request(str(n), tokenizer.encode(text), SamplingParams(**params)) for n, (text, params) in enumerate(LINES)
    ]
    alone, _ = run_in_threads(engine_config(model, 2, max_num_seqs=1), [requests])
    together, stats = run_in_threads(engine_config(model, 2, kv_cache_memory=128 << 20), [requests])
    assert together == alone
    assert len(together) == 64
    assert stats.preemptions == 0
    # 8 blocks of 16 tokens, where any two of the first four lines want 10 in the end.
    memory = 4 << 20 if whole else 270 << 10
    crowded, stats = run_in_threads(engine_config(model, 2, kv_cache_memory=memory), [requests])
    assert crowded == alone
    assert stats.prefix_cache_hit_tokens > 0 < stats.preemptions
