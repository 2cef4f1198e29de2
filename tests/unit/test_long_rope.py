"""Long RoPE (Phi-3): tables change with the length so far alone, as in the ``generate`` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_checkpoint
from tests.unit.generating import PROMPTS, TOKENS, generated, requests, run
from tpctl.sharding.cutting.shard import shard_checkpoint

BORDER = 24
"""``original_max_position_embeddings`` of the tiny checkpoints."""


@pytest.fixture(scope="module", params=["phi3-long-rope", "phi4-mini"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """Shards for one and two ranks, and what transformers' ``generate`` answers."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_checkpoint(request.param, folder / "hf")
    expected = generated(model)
    for tp_size in (1, 2):
        shard_checkpoint(folder / "hf", folder / f"tp{tp_size}", tp_size)
    return folder, expected


@pytest.mark.grid(1, daily=True)
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
    tokens, stats = run(folder / f"tp{tp_size}", tp_size, [requests(), requests("again ")], **settings)
    assert [tokens[str(index)] for index in range(len(PROMPTS))] == expected
    assert [tokens[f"again {index}"] for index in range(len(PROMPTS))] == expected
    assert (stats.preemptions > 0) == ("kv_cache_memory" in settings)
    if "enable_prefix_caching" not in settings:
        assert stats.prefix_cache_hit_tokens > 0


def test_tokens_do_not_depend_on_max_tokens(made: tuple[Path, list[list[int]]]) -> None:
    folder, expected = made
    for most in (1, BORDER - 17, BORDER - 16, 29, 88):
        tokens, _ = run(folder / "tp1", 1, [requests(max_tokens=most)])
        for index, answer in enumerate(expected):
            assert tokens[str(index)][:TOKENS] == answer[:most]


def test_sampled_tokens_are_the_same_in_any_company(made: tuple[Path, list[list[int]]]) -> None:
    folder, _ = made
    way = {"temperature": 1.1, "top_p": 0.95, "seed": 5, "presence_penalty": 0.4}
    together, _ = run(folder / "tp1", 1, [requests(**way)])
    alone, _ = run(folder / "tp2", 2, [[request] for request in requests(**way)])
    assert together == alone
