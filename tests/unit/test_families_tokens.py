"""Every family answers the same tokens alone, together, from the prefix cache, in chunks and after it gave up its
blocks, at even and uneven sizes: those of transformers, well beyond any window.

The logits of every position are held against transformers' in ``test_models.py``, ``test_models_mixtures.py`` and
``test_models_attention.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import FAMILIES, make_checkpoint, make_mixture
from tests.tiny import MIXTURES as CLASSES
from tests.tiny_dense import SEEING, make_seeing
from tests.unit.generating import answers, memory_for, run
from tests.unit.same_tokens import PROMPTS, SMALL_STATES, TOKENS, asked
from tests.unit.test_models_attention import MIXTURES
from tpctl.sharding.cutting.shard import shard_checkpoint

DENSE = (
    *("cohere2-biases", "gemma2-caps", "gemma3-caps", "gemma4-text", "gemma4-text-edge", "gemma4-text-moe"),
    *("gemma4-unified-text", "glm4", "granite-biases", "llama3", "ministral3-window", "mistral", "olmo2-copies"),
    *("olmo3-yarn", "phi3-window", "qwen2-window", "qwen3", "seed-oss", "smollm3-window"),
)
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    **MIXTURES,
    **{name: (name, {}) for name in ("deepseek_v3-no-q-rank", "glm4_moe", "mixtral")},
    **{name: (name, {"attention_bias": False}) for name in ("deepseek_v3", "qwen3_moe")},  # or answers are all alike
    **{name: (name, SMALL_STATES) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "qwen2_moe": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
}
TIMES = {"ministral3-window": 1.7, "qwen3_next": 1.6, "qwen3_5_text": 1.6, "qwen3_5_moe_text": 1.6}
"""Of the smallest cache that a tight one has, where twice as much would hold all windows at once."""
LONGEST = max(map(len, PROMPTS)) + TOKENS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: a checkpoint, transformers' model, and the answers that are known of it; made when first asked for."""

    class Made(dict[str, tuple[Path, Any, list[list[int]]]]):
        def __missing__(self, name: str) -> tuple[Path, Any, list[list[int]]]:
            folder = tmp_path_factory.mktemp(name) / "model"
            if name in MIXED:
                kind, changes = MIXED[name]
                model = make_mixture(kind, folder, **changes)
            else:
                model = (make_checkpoint if name in FAMILIES else make_seeing)(name, folder)
            self[name] = folder, model, []
            return self[name]

    return Made()


def family(name: str) -> str:
    """What transformers calls it."""
    if name in MIXED:
        return CLASSES[MIXED[name][0]][0]
    return (FAMILIES.get(name) or SEEING[name])[0]


@pytest.mark.grid(1, daily=True, alike={"name": family})
@pytest.mark.parametrize("way", ["whole", "tight"])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 5])
@pytest.mark.parametrize("name", [*DENSE, *MIXED, "mistral3-untied", "mistral3-ministral"])
def test_greedy_tokens_equal_transformers(name: str, tp_size: int, way: str, made: Any, tmp_path: Path) -> None:
    folder, model, expected = made[name]
    shards = tmp_path / "shards"
    shard_checkpoint(folder, shards, tp_size, text_only=name in SEEING)
    groups, settings = [asked("first "), asked("again ")], {"kv_cache_memory": 1 << 23}
    if way == "whole":
        groups = [[one] for one in asked("alone ")[1:3]] + groups
    else:
        least = memory_for(shards, tp_size, LONGEST, len(PROMPTS))
        settings = {"kv_cache_memory": int(TIMES.get(name, 2) * least), "max_num_batched_tokens": 10}
    tokens, stats = run(shards, tp_size, groups, max_num_seqs=len(PROMPTS), max_model_len=LONGEST, **settings)
    if not expected:
        guess = [tokens[f"first {number}"] for number in range(len(PROMPTS))]
        expected += answers(model, PROMPTS, TOKENS, guess=guess)
    assert len(expected[0]) == TOKENS and len({tuple(answer) for answer in expected}) > 3
    found = {name: answer for name, answer in tokens.items() if answer != expected[int(name.split()[1])]}
    assert not found
    assert len(tokens) == 2 * len(PROMPTS) + (2 if way == "whole" else 0)
    assert (stats.preemptions > 0) == (way == "tight")
    assert stats.prefix_cache_hit_tokens > 0
