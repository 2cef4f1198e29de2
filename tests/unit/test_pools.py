"""Models whose layers keep different parts of a sequence: full attention, and windows of which only the blocks in sight
are kept. Their answers are those of transformers, alone, together, from the prefix cache, in chunks and preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint, make_mixture
from tests.unit.generating import answers, memory_for, run
from tpctl.accounting import KvLayout, KvNeed, LayerPool, layout_of
from tpctl.attention_choice import KINDS, Kind
from tpctl.checkpoint.metadata import read_metadata
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine, make_runner
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

TOKENS = 24
SHARED = [(11 * number) % 120 + 3 for number in range(60)]
PROMPTS = [SHARED[:60], SHARED[:33], [*SHARED[:40], 77, 78, 79], [9, 8, 7], [50] * 21, SHARED[:5]]
"""Most are several windows long, of 7 to 11 tokens."""

FAMILIES: dict[str, dict[str, Any]] = {"gemma2": {}, "gemma3": {}, "mistral": {}, "gpt_oss": {"sliding_window": 7}}
"""With two kinds of layers, and mistral, of which all have a window. Other families: ``test_families_tokens.py``."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: a checkpoint, transformers' model, and the answers that are known of it; made when first asked for."""

    class Made(dict[str, tuple[Path, Any, list[list[int]]]]):
        def __missing__(self, name: str) -> tuple[Path, Any, list[list[int]]]:
            folder, changes = tmp_path_factory.mktemp(name) / "model", FAMILIES[name]
            make = make_mixture if name == "gpt_oss" else make_checkpoint
            model = make(name, folder, **changes)
            self[name] = folder, model, []
            return self[name]

    return Made()


def asked(prefix: str = "", prompts: list[list[int]] = PROMPTS, count: int = TOKENS) -> list[Request]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [Request(f"{prefix}{number}", prompt, params) for number, prompt in enumerate(prompts)]


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("name", "tp_size"), [("gemma3", 1), ("gemma3", 3), ("gemma2", 4), ("mistral", 2), ("mistral", 3), ("gpt_oss", 2)]
)
def test_tokens_equal_transformers(name: str, tp_size: int, made: Any, tmp_path: Path) -> None:
    folder, model, expected = made[name]
    shards = tmp_path / "shards"
    shard_checkpoint(folder, shards, tp_size)
    alone = [[one] for one in asked("alone ", PROMPTS[:3])]
    tokens, stats = run(shards, tp_size, [*alone, asked("together "), asked("again ")])
    if not expected:
        expected += answers(model, PROMPTS, TOKENS, guess=[tokens[f"again {number}"] for number in range(len(PROMPTS))])
    assert [tokens[f"alone {number}"] for number in range(3)] == expected[:3]
    for way in ("together", "again"):
        assert [tokens[f"{way} {number}"] for number in range(len(PROMPTS))] == expected, way
    assert stats.prefix_cache_hit_tokens > 3 * 32 and stats.preemptions == 0
    assert stats.free_blocks == stats.num_blocks

    # In a cache that holds the longest and little more, in chunks of a few tokens.
    memory = memory_for(shards, tp_size, 90)
    crowded = {"kv_cache_memory": memory, "max_num_batched_tokens": 13, "max_num_seqs": 5, "max_model_len": 90}
    tokens, stats = run(shards, tp_size, [asked(), asked("again ")], **crowded)
    for prefix in ("", "again "):
        assert [tokens[f"{prefix}{number}"] for number in range(len(PROMPTS))] == expected
    assert stats.preemptions > 0 and stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize(("name", "tp_size"), [("gemma3", 3), ("mistral", 2), ("gpt_oss", 2)])
def test_turns_of_a_conversation(name: str, tp_size: int, made: Any, tmp_path: Path) -> None:
    folder, model, _ = made[name]
    turns, expected = [SHARED[:21]], []
    for said in ([5, 6, 7], [8] * 6, [9]):
        expected += answers(model, turns[-1:], TOKENS)
        turns.append([*turns[-1], *expected[-1], *said])
    shard_checkpoint(folder, tmp_path / "shards", tp_size)
    params = asked()[0].sampling
    groups = [[Request(str(number), turn, params)] for number, turn in enumerate(turns[:3])]
    tokens, stats = run(tmp_path / "shards", tp_size, groups)
    assert [tokens[str(number)] for number in range(3)] == expected
    # Of each turn but the first, the blocks of 4 that the one before has filled, its last token not being computed.
    assert stats.prefix_cache_hit_tokens == sum((len(turn) + TOKENS - 1) // 4 * 4 for turn in turns[:2])


def test_a_sequence_holds_no_more_than_its_windows(made: Any, tmp_path: Path) -> None:
    folder, model, _ = made["gemma3"]  # one layer of four sees all tokens, the others 9
    shard_checkpoint(folder, tmp_path / "shards", 1)
    config = EngineConfig(tmp_path / "shards", 1, kv_cache_memory=1 << 20, block_size=4, max_num_batched_tokens=64)
    with torch.inference_mode():
        engine = Engine(config, TPGroup())
        assert engine.runner.loaded.layout == KvLayout(4, (None, 9), (3, 1))
        engine.apply(Add(asked()[:1]))
        tokens: list[int] = []
        while engine.has_work:
            running = list(engine.scheduler.running.values())
            for output in engine.step():
                tokens += output.token_ids
            if running and running[0].block_tables and len(tokens) > 1:
                whole, window = ([block for block in table if block >= 0] for table in running[0].block_tables)
                assert len(whole) == -(-running[0].num_computed_tokens // 4) or len(whole) == 15
                assert len(window) <= 3
        assert [tokens] == answers(model, PROMPTS[:1], TOKENS, guess=[tokens])


@pytest.mark.parametrize(
    ("layers", "blocks", "held"),
    [
        ([(None, 8), (1024, 40)], 40, (5, 1)),  # Gemma-3-12B
        ([(None, 10), (1024, 52)], 52, (5, 1)),  # Gemma-3-27B: a twenty-sixth is left over
        ([(None, 12), (128, 12)], 12, (1, 1)),  # gpt-oss-20b
        ([(None, 2), (9, 3)], 6, (3, 2)),
        ([(None, 48)], 48, (1,)),
        ([(512, 26)], 26, (1,)),
    ],
)
def test_slabs_leave_little_over(layers: list[tuple[int | None, int]], blocks: int, held: tuple[int, ...]) -> None:
    pools = [LayerPool(window, count, 100) for window, count in layers]
    layout = layout_of([pools], 128)
    assert layout.per_slab == held
    assert max(pool.block_bytes * each for pool, each in zip(pools, held, strict=True)) == blocks * 100


@pytest.mark.parametrize("tp_size", [1, 3])
def test_memory_is_what_is_planned(tp_size: int, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's figures and the engine's: bytes of a token and of windows, and the longest sequence of a cache."""
    folder, _, _ = made["gemma3"]
    block, memory = 4, 60_000
    monkeypatch.setitem(KINDS, "triton", Kind(block))
    report = plan_model(read_metadata(str(folder)), Budget(), tp_size=tp_size)
    assert (report.windowed, report.window) == (3, 9)
    shard_checkpoint(folder, tmp_path / "shards", tp_size)

    def rank(group: TPGroup) -> tuple[Any, list[Any], int]:
        settings = {"kv_cache_memory": memory, "block_size": block, "max_num_batched_tokens": 64}
        runner = make_runner(EngineConfig(tmp_path / "shards", tp_size, **settings), group)
        loaded, planned = runner.loaded, report.ranks[group.rank]
        heads = planned.kv_heads
        assert planned.kv_bytes_per_token == heads * 2 * 16 * 4  # one of four layers, of 16 dimensions, in float32
        assert planned.window_bytes == 3 * block * 3 * heads * 2 * 16 * 4  # 9 tokens touch three blocks at most
        assert loaded.slab_bytes == 3 * block * planned.kv_bytes_per_token
        assert loaded.layout.per_slab == (3, 1)
        storages = {kv.k.untyped_storage().data_ptr(): kv.k.untyped_storage().nbytes() for kv in runner.kv}
        assert sum(storages.values()) == (runner.memory.num_blocks + 1) * loaded.slab_bytes  # one stays empty
        assert runner.info().kv_cache_bytes == runner.memory.num_blocks * loaded.slab_bytes <= memory
        need = KvNeed(planned.kv_bytes_per_token, ((3 * block, 9 * heads * 2 * 16 * 4 // 3),))
        assert need.sequence(100) == 100 * planned.kv_bytes_per_token + planned.window_bytes
        longest = loaded.layout.longest(runner.memory.num_blocks)
        assert longest is not None and longest > 128
        return runner.memory.num_blocks, [need.longest(memory, 1 << 20)], longest

    for _, (planned,), longest in run_ranks(tp_size, torch.inference_mode()(rank))[:1]:
        assert planned - 2 * 3 * block <= longest <= planned  # a slab may be part of a block's, or the last one's
