"""Long RoPE (Phi-3): tables change with the length so far alone, as in the ``generate`` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

BORDER = 24
"""``original_max_position_embeddings`` of the tiny checkpoints."""
TOKENS = 30
SHARED = [(7 * i) % 120 + 3 for i in range(40)]
PROMPTS = [*(SHARED[:length] for length in (3, 17, 23, 24, 25, 40)), [*SHARED[:20], 77, 78], [9, 8, 7], [50] * 13]


@pytest.fixture(scope="module", params=["phi3-long-rope", "phi4-mini"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """Shards for one and two ranks, and what transformers' ``generate`` answers."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_checkpoint(request.param, folder / "hf")
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        expected.append(answer[0, len(prompt) :].tolist())
    for tp_size in (1, 2):
        shard_checkpoint(folder / "hf", folder / f"tp{tp_size}", tp_size)
    return folder, expected


def run(folder: Path, tp_size: int, groups: list[list[Request]], **settings: Any) -> tuple[dict[str, list[int]], Any]:
    """The tokens of each request, group after group in one engine; and its counters."""
    values: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 4, **settings}
    config = EngineConfig(folder / f"tp{tp_size}", tp_size, **values)

    def rank(group: TPGroup) -> tuple[dict[str, list[int]], Any]:
        tokens: dict[str, list[int]] = {}
        with torch.inference_mode():
            engine = Engine(config, group)
            for requests in groups:
                engine.apply(Add(requests))
                while engine.has_work:
                    for output in engine.step():
                        assert output.finish_reason in (None, "length")
                        tokens.setdefault(output.id, []).extend(output.token_ids)
            return tokens, engine.stats()

    results = run_ranks(tp_size, rank)
    assert all(tokens == results[0][0] for tokens, _ in results)
    return results[0]


def requests(prefix: str = "", **way: Any) -> list[Request]:
    params = SamplingParams(**{"max_tokens": TOKENS, "ignore_eos": True, **way})
    return [Request(f"{prefix}{index}", prompt, params) for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 10, "max_num_seqs": 4},
        {"kv_cache_memory": 80_000, "max_num_seqs": 9},
        {"enable_prefix_caching": False},
    ],
    ids=["whole", "chunks", "crowded", "unshared"],
)
def test_greedy_tokens_equal_generate_across_the_border(
    made: tuple[Path, list[list[int]]], tp_size: int, settings: dict[str, Any]
) -> None:
    folder, expected = made
    # The second time most blocks are found in the prefix cache, of both tables.
    tokens, stats = run(folder, tp_size, [requests(), requests("again ")], **settings)
    assert [tokens[str(index)] for index in range(len(PROMPTS))] == expected
    assert [tokens[f"again {index}"] for index in range(len(PROMPTS))] == expected
    assert (stats.preemptions > 0) == ("kv_cache_memory" in settings)
    if "enable_prefix_caching" not in settings:
        assert stats.prefix_cache_hit_tokens > 0


def test_tokens_do_not_depend_on_max_tokens(made: tuple[Path, list[list[int]]]) -> None:
    folder, expected = made
    for most in (1, BORDER - 17, BORDER - 16, 29, 88):
        tokens, _ = run(folder, 1, [requests(max_tokens=most)])
        for index, answer in enumerate(expected):
            assert tokens[str(index)][:TOKENS] == answer[:most]


def test_sampled_tokens_are_the_same_in_any_company(made: tuple[Path, list[list[int]]]) -> None:
    folder, _ = made
    way = {"temperature": 1.1, "top_p": 0.95, "seed": 5, "presence_penalty": 0.4}
    together, _ = run(folder, 1, [requests(**way)])
    alone, _ = run(folder, 2, [[request] for request in requests(**way)])
    assert together == alone
