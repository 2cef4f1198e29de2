"""Mixtures of experts and quantised models answer the same tokens alone, together, from the prefix cache, in chunks and
after they had to give up their blocks: those of transformers' ``generate``, with the numbers that codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_mixture
from tests.unit.generating import answers, run
from tests.unit.packers import PACKERS
from tests.unit.same_tokens import PROMPTS, SHARED, SMALL_STATES, TOKENS, asked
from tests.unit.test_quantised_runs import dense, model_of
from tpctl.arch.quantised import Cutting
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request

WIDE, CROWDED = 1 << 20, 12
"""Bytes of KV cache for all prompts at once; blocks of 4 tokens that hold the longest sequence and little more."""


def check(
    model: Path,
    reference: Any,
    tmp_path: Path,
    tp_size: int,
    cutting: Cutting,
    crowded_memory: int | None = None,
) -> list[list[int]]:
    """The answers, which are those of ``reference``."""
    for size, cut in ((1, Cutting()), (tp_size, cutting)):
        shard_checkpoint(model, tmp_path / f"tp{size}", size, cutting=cut)
    alone = [[one] for one in asked("alone ", PROMPTS[1:4])]
    together = [asked("together "), asked("again ")]
    tokens, wide = run(tmp_path / "tp1", 1, [*alone, *together], kv_cache_memory=WIDE)
    expected = answers(reference, PROMPTS, TOKENS, guess=[tokens[f"again {number}"] for number in range(len(PROMPTS))])
    assert [tokens[f"alone {number}"] for number in range(3)] == expected[1:4]
    for way in ("together", "again"):
        assert [tokens[f"{way} {number}"] for number in range(len(PROMPTS))] == expected, way
    assert wide.prefix_cache_hit_tokens > 0 and wide.preemptions == 0

    _, one = run(tmp_path / f"tp{tp_size}", tp_size, [], kv_cache_memory=WIDE)
    memory = crowded_memory or (WIDE // one.num_blocks) * CROWDED
    crowded = {"kv_cache_memory": memory, "max_num_batched_tokens": 10, "max_num_seqs": 6}
    tokens, stats = run(tmp_path / f"tp{tp_size}", tp_size, [asked()], **crowded)
    assert [tokens[str(number)] for number in range(len(PROMPTS))] == expected
    assert stats.preemptions > 0 and CROWDED <= stats.num_blocks <= CROWDED + 2
    return expected


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("name", "tp_size", "groups"),
    [
        *[("mixtral", 2, 2), ("qwen2_moe", 3, 1), ("qwen3_moe", 2, 1), ("glm4_moe", 3, 3)],
        *[("deepseek_v3", 2, 1), ("deepseek_v3", 4, 2), ("deepseek_v3-no-q-rank", 5, 1)],
    ],
)
def test_mixtures(name: str, tp_size: int, groups: int, tmp_path: Path) -> None:
    plain = {"attention_bias": False} if name in ("deepseek_v3", "qwen3_moe") else {}  # or answers are all alike
    model = make_mixture(name, tmp_path / "model", **plain)
    found = check(tmp_path / "model", model, tmp_path, tp_size, Cutting(groups))
    assert len({tuple(answer) for answer in found}) > 3


@pytest.mark.parametrize(
    ("name", "tp_size", "groups", "memory"),
    [("qwen3_next", 2, 2, 6400), ("qwen3_5_text", 5, 1, 6300), ("qwen3_5_moe_text", 3, 3, 6300)],
)
def test_recurrent_layers(name: str, tp_size: int, groups: int, memory: int, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "model", **SMALL_STATES)
    check(tmp_path / "model", model, tmp_path, tp_size, Cutting(groups), memory)


@pytest.mark.parametrize(("name", "tp_size"), [("qwen3_next", 3), ("qwen3_5_text", 4)])
def test_turns_of_a_conversation_go_on_from_the_state_before(name: str, tp_size: int, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "model")
    turns, expected = [SHARED[:13]], []
    for said in ([5, 6, 7], [8] * 6, [9]):
        expected += answers(model, turns[-1:], TOKENS)
        turns.append([*turns[-1], *expected[-1], *said])
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)
    groups = [[Request(str(number), turn, asked()[0].sampling)] for number, turn in enumerate(turns[:3])]
    tokens, stats = run(tmp_path / "shards", tp_size, groups, kv_cache_memory=WIDE)
    assert [tokens[str(number)] for number in range(3)] == expected
    # Of each turn but the first, the blocks of 4 that the one before has filled, its last token not being computed.
    spared = [(len(turn) + TOKENS - 1) // 4 * 4 for turn in turns[:2]]
    assert stats.prefix_cache_hit_tokens == sum(spared)


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("family", "packer", "tp_size", "groups"),
    [
        ("llama", "fp8", 3, 1),
        ("llama", "awq", 2, 1),
        ("llama", "gptq in order of activation", 3, 1),
        ("llama", "ct int4", 3, 1),
        ("llama", "ct nvfp4", 2, 1),
        ("qwen3_moe", "fp8", 3, 1),
        ("qwen3_moe", "ct int4", 2, 2),
        ("deepseek_v3", "fp8 of other blocks", 4, 1),
    ],
)
def test_quantised(family: str, packer: str, tp_size: int, groups: int, tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 6, "qk_rope_head_dim": 16} if family == "deepseek_v3" else {}
    made = model_of(family, PACKERS[packer], **heads)
    made.save(tmp_path / "model")
    found = check(tmp_path / "model", dense(made, tmp_path / "dense"), tmp_path, tp_size, Cutting(groups))
    assert len({tuple(answer) for answer in found}) > 3
