"""Mixtures of experts and quantised models answer the same tokens alone, together, from the prefix cache, in chunks and
after they had to give up their blocks: those of transformers' ``generate``, with the numbers that codes stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_mixture
from tests.unit.generating import answers, requests, run
from tests.unit.packers import PACKERS
from tests.unit.test_quantised_runs import dense, model_of
from tpctl.arch.quantised import Cutting
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request

TOKENS = 10
SHARED = [(7 * number) % 120 + 3 for number in range(30)]
PROMPTS = [*(SHARED[:length] for length in (3, 17, 30)), [*SHARED[:20], 77, 78], [9, 8, 7], [50] * 13]
WIDE, CROWDED = 1 << 20, 12
"""Bytes of KV cache for all prompts at once; blocks of 4 tokens that hold the longest sequence and little more."""


def asked(prefix: str = "", prompts: list[list[int]] = PROMPTS) -> list[Request]:
    return requests(prefix, prompts, max_tokens=TOKENS)


def check(model: Path, expected: list[list[int]], tmp_path: Path, tp_size: int, cutting: Cutting) -> None:
    for size, cut in ((1, Cutting()), (tp_size, cutting)):
        shard_checkpoint(model, tmp_path / f"tp{size}", size, cutting=cut)
    alone = [[one] for one in asked("alone ", PROMPTS[1:4])]
    together = [asked("together "), asked("again ")]
    tokens, wide = run(tmp_path / "tp1", 1, [*alone, *together], kv_cache_memory=WIDE)
    assert [tokens[f"alone {number}"] for number in range(3)] == expected[1:4]
    for way in ("together", "again"):
        assert [tokens[f"{way} {number}"] for number in range(len(PROMPTS))] == expected, way
    assert wide.prefix_cache_hit_tokens > 0 and wide.preemptions == 0

    _, one = run(tmp_path / f"tp{tp_size}", tp_size, [], kv_cache_memory=WIDE)
    crowded = {"kv_cache_memory": (WIDE // one.num_blocks) * CROWDED, "max_num_batched_tokens": 10, "max_num_seqs": 6}
    tokens, stats = run(tmp_path / f"tp{tp_size}", tp_size, [asked()], **crowded)
    assert [tokens[str(number)] for number in range(len(PROMPTS))] == expected
    assert stats.preemptions > 0 and CROWDED <= stats.num_blocks <= CROWDED + 1


@pytest.mark.parametrize(
    ("name", "tp_size", "groups"), [("mixtral", 2, 2), ("qwen2_moe", 3, 1), ("qwen3_moe", 2, 1), ("glm4_moe", 3, 3)]
)
def test_mixtures(name: str, tp_size: int, groups: int, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "model")
    check(tmp_path / "model", answers(model, PROMPTS, TOKENS), tmp_path, tp_size, Cutting(groups))


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
    ],
)
def test_quantised(family: str, packer: str, tp_size: int, groups: int, tmp_path: Path) -> None:
    made = model_of(family, PACKERS[packer])
    made.save(tmp_path / "model")
    expected = answers(dense(made, tmp_path / "dense"), PROMPTS, TOKENS)
    assert len({tuple(answer) for answer in expected}) > 3
    check(tmp_path / "model", expected, tmp_path, tp_size, Cutting(groups))
