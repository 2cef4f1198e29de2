"""Every family's logits equal transformers', at every position, at even and uneven tensor-parallel sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import FAMILIES, make_checkpoint, make_mixture
from tests.tiny_dense import SEEING, make_seeing
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.engine.runners.runner import ModelRunner
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence, StateUse
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.steps.batch import build_forward_batch
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

CHUNKS = (5, 1, 9, 1, 1, 3)  # a prompt computed in pieces: prefill, decode, prefill over a cached prefix, …


def within(name: str) -> float:
    """What a logit may differ by. Of one family transformers in float32 is itself 0.8e-4 from what it computes in
    float64, and tpctl as far (logits up to 7)."""
    return 3e-4 if name == "qwen3_5_moe_text" else 1e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, object]]:
    return {}


def logits_of(
    folder: Path, tp_size: int, prompts: list[list[int]], chunks: tuple[int, ...] = CHUNKS, **changes: Any
) -> torch.Tensor:
    """[prompts, length, vocabulary] of equally long prompts, computed together in chunks."""

    def rank(group: TPGroup) -> torch.Tensor:
        values: dict[str, Any] = {"kv_cache_memory": 1 << 22, "block_size": 4, "max_num_seqs": 8, **changes}
        config = EngineConfig(folder, tp_size, **values)
        runner = make_runner(config, group)
        memory = runner.memory
        blocks = BlockManager(memory.num_blocks, 4, enable_prefix_caching=False, layout=memory.layout)
        sequences = [Sequence(str(i), ids, SamplingParams(), 256) for i, ids in enumerate(prompts)]
        for sequence in sequences:
            sequence.rope_offset = runner.rope_offset(len(sequence.token_ids))
        found, start, length = [], 0, len(prompts[0])
        while start < length:
            size = min(chunks[len(found) % len(chunks)], length - start)
            for sequence in sequences:
                assert blocks.grow(sequence, start + size)
                sequence.num_computed_tokens = start + size
            items = [
                ScheduledSequence(sequence, start, size, size == 1, state_of(runner, slot, start))
                for slot, sequence in enumerate(sequences)
            ]
            forward = build_forward_batch(
                ScheduledBatch(items, len(items) if size == 1 else 0), 4, group.device, runner.backend.places
            )
            found.append(runner.model(forward, runner.kv).view(len(prompts), size, -1))
            start += size
        whole = torch.cat(found, dim=1)
        vocab_slices = build_plan(runner.loaded.config, tp_size).vocab_slices
        width = max(map(len, vocab_slices))
        padded = torch.nn.functional.pad(whole, (0, width - whole.shape[-1]))
        gathered = group.all_gather(padded)
        slices = [gathered[r, ..., : len(piece)] for r, piece in enumerate(vocab_slices)]
        return torch.cat(slices, dim=-1)[..., : runner.loaded.config.vocab_size]

    with torch.inference_mode():
        results = run_ranks(tp_size, lambda group: torch.inference_mode()(rank)(group))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    return results[0]


def state_of(runner: ModelRunner, slot: int, start: int) -> StateUse | None:
    """Where recurrent layers have the state of a sequence that has come to token ``start``."""
    return StateUse(slot, slot if start else None) if runner.memory.num_states else None


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_logits_equal_transformers(name: str, tp_size: int, checkpoints: dict, tmp_path_factory) -> None:
    if name not in checkpoints:
        folder = tmp_path_factory.mktemp(name)
        checkpoints[name] = (folder, make_checkpoint(name, folder))
    folder, model = checkpoints[name]
    torch.manual_seed(7)
    # Long RoPE switches its table at 24 tokens: one length on each side of it.
    lengths = (20, 40) if "long" in name or "phi4" in name else (40,)
    shards = tmp_path_factory.mktemp(f"{name}-tp{tp_size}") / "shards"
    shard_checkpoint(folder, shards, tp_size)
    for length in lengths:
        prompts = torch.randint(3, 131, (2, length))
        with torch.no_grad():
            expected = model(prompts).logits
        found = logits_of(shards, tp_size, prompts.tolist())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", SEEING)
def test_the_text_of_a_model_that_sees(name: str, tp_size: int, tmp_path: Path) -> None:
    model = make_seeing(name, tmp_path / "model")
    assert ModelConfig.load(tmp_path / "model").blueprint.towers
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size, text_only=True)
    prompts = torch.randint(11, 131, (2, 40))
    with torch.no_grad():
        expected = model(prompts).logits
    torch.testing.assert_close(logits_of(tmp_path / "shards", tp_size, prompts.tolist()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama2", "gemma2"])  # the second's head has another name there
def test_a_folder_made_for_vllm_runs_too(tmp_path: Path, name: str) -> None:
    make_checkpoint(name, tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "plain", 2)
    shard_checkpoint(tmp_path / "model", tmp_path / "vllm", 2, compat="vllm")
    prompts = torch.randint(3, 131, (2, 20)).tolist()
    torch.testing.assert_close(logits_of(tmp_path / "vllm", 2, prompts), logits_of(tmp_path / "plain", 2, prompts))


@pytest.mark.parametrize(
    "name",
    [
        *("glm4_moe", "minimax_m2", "qwen2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        *("deepseek_v3", "deepseek_v3-no-q-rank"),
    ],
)
def test_a_mixture_made_for_vllm_runs_too(name: str, tmp_path: Path) -> None:
    """Whose names for routers and experts are others, one inside of another."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 32}
    if name.startswith("qwen3"):
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    if name.startswith("deepseek"):
        sizes |= {"num_key_value_heads": 8, "attention_bias": False}
    if name not in ("minimax_m2", "qwen3_5_text"):
        sizes |= {"moe_intermediate_size": 32}
    if name in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"):
        sizes |= {"shared_expert_intermediate_size": 32}
    model = make_mixture(name, tmp_path / "model", **sizes)
    shard_checkpoint(tmp_path / "model", tmp_path / "vllm", 2, compat="vllm")
    prompts = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompts).logits
    found = logits_of(tmp_path / "vllm", 2, prompts.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=within(name))
