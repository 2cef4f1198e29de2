"""The logits that tokens are sampled from, in bfloat16, against float32: every backend, on random lengths, shared
prefixes, and block tables in random order.

What rounding may do to a model is measured and not guessed: transformers' own bfloat16 model is as far from float32 as
that dtype takes one, and nothing here may be much further.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.engine_runs import CHANGES, WIDE
from tests.gpu.logit_errors import DEVICE, WAYS, Expected, Run, mean_square, record, rms, rounded_too
from tests.tiny import make_checkpoint
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.layers.attention.flash import installed_flash_attention
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = pytest.mark.gpu
BACKENDS = ("triton", "packed", "sdpa", "flash-attn")
"""Of attention, each with keys and values as they are; ``packed``: triton with ``kernels.attention.packed_kv``."""

# flash-attn takes blocks of 256 tokens, so prefixes are longer than that and prompts longer than most.
PREFIX, LONGEST, TOKENS = 300, 800, 12


def prompts_of(vocab: int, seed: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Prompts of random lengths, some of which begin alike; and others that come when those have ended."""
    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(length)]

    shared = [text(PREFIX), text(2 * PREFIX)]

    def prompts(name: str) -> dict[str, list[int]]:
        lengths = [1, 2, rng.randint(250, 260), *(rng.randint(3, LONGEST) for _ in range(5))]
        found = [text(length) for length in lengths]
        found += [prefix + text(rng.randint(1, 200)) for prefix in shared for _ in range(3)]
        rng.shuffle(found)
        return {f"{name}{number}": ids for number, ids in enumerate(found)}

    return prompts("first"), prompts("second")


def run(
    folder: Path, waves: tuple[dict[str, list[int]], ...], backend: str, way: str = "graphs", **settings: Any
) -> Run:
    defaults: dict[str, Any] = {"kv_cache_memory": 256 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 384}
    if backend == "flash-attn":
        defaults["block_size"] = 256
    defaults |= {"attention_backend": backend, "kv_cache_dtype": "model"}
    if backend == "packed":
        defaults |= {"attention_backend": "triton", "kv_cache_dtype": "packed"}
    config = EngineConfig(folder, 1, device=DEVICE, dtype="bfloat16", **{**defaults, **WAYS[way], **settings})
    engine = Engine(config, TPGroup(0, 1, DEVICE))
    found = Run({})
    found.logits = record(engine, 1024)
    blocks = engine.scheduler.blocks
    random.Random(5).shuffle(blocks.slabs.empty)
    # A job whose answers are short is not worth pacing.
    params = SamplingParams(max_tokens=8 * TOKENS if way == "paced" else TOKENS, ignore_eos=True)
    tables = 0
    for wave in waves:
        hits = blocks.hit_tokens
        found.tokens |= {id: [] for id in wave}
        engine.apply(Add([Request(id, ids, params) for id, ids in wave.items()]))
        while engine.has_work:
            for output in engine.step():
                found.tokens[output.id] += output.token_ids
            running = [sequence.block_tables[0] for sequence in engine.scheduler.running.values()]
            tables += sum(table != sorted(table) for table in running)
        assert blocks.hit_tokens - hits >= (256 if wave is waves[0] else 5 * 256)
    assert tables > 0
    assert (engine.scheduler.stats.paced_steps > 0) == (way == "paced")
    if way == "paced":
        mixed: Any = engine.runner
        assert mixed._mixed._captured
    engine.scheduler.check_integrity()
    return found


def check_pair(one: Run, other: Run, prompts: dict[str, list[int]], expected: Expected) -> None:
    """Two runs choose the same tokens from logits as close as rounding lets them be, up to a first tie."""
    usual = mean_square(expected.noise.values())
    same = ties = 0
    for id, ids in prompts.items():
        for step, (mine, yours) in enumerate(zip(one.tokens[id], other.tokens[id], strict=True)):
            key = (id, len(ids) + step)
            apart = rms(one.logits[key] - other.logits[key])
            assert apart < 8 * max(expected.noise[key], usual), key
            if mine != yours:
                # From here on they continue different texts. Rounding alone may have decided: float32 has both close.
                want = expected.logits[key]
                assert abs(float(want[mine] - want[yours])) < 8 * max(expected.noise[key], usual), key
                ties += 1
                break
            same += 1
    print(f"  {same} tokens the same, {ties} ties")
    assert same > 5 * ties


def skip_without(backend: str) -> None:
    if backend == "flash-attn" and installed_flash_attention() is None:
        pytest.skip("flash-attn is not installed")


def models_of(name: str, folder: Path) -> tuple[Any, Any]:
    """The float32 model and the same rounded to bfloat16; the checkpoint is left in ``folder``."""
    shape = {**WIDE, "max_position_embeddings": 1024, **CHANGES[name]}
    return rounded_too(make_checkpoint(name, folder / "hf", **shape), folder)


@pytest.mark.parametrize(
    "backend,way",
    [
        *((name, way) for name in ("triton", "packed") for way in WAYS),
        ("sdpa", "eager"),
        ("flash-attn", "graphs"),
        ("flash-attn", "eager"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2-window"])
def test_bfloat16_logits(name: str, backend: str, way: str, tmp_path: Path) -> None:
    skip_without(backend)
    model, rounded = models_of(name, tmp_path)
    waves = prompts_of(517, seed=len(name))
    found = run(tmp_path / "tp1", waves, backend, way)
    expected = Expected.of(model, rounded, waves[0] | waves[1], found.tokens)
    assert expected.check(found) < 1.4


@pytest.mark.parametrize("other", ["flash-attn", "packed"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2-window"])
def test_others_give_the_tokens_of_triton(name: str, other: str, tmp_path: Path) -> None:
    skip_without(other)
    model, rounded = models_of(name, tmp_path)
    waves = prompts_of(517, seed=9)
    triton, found = (run(tmp_path / "tp1", waves, backend) for backend in ("triton", other))
    prompts = waves[0] | waves[1]
    check_pair(triton, found, prompts, Expected.of(model, rounded, prompts, triton.tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logits_of_real_weights(backend: str, demo: ResolvedSource) -> None:
    from transformers import AutoModelForCausalLM

    skip_without(backend)
    model, rounded = (
        AutoModelForCausalLM.from_pretrained(demo.folder, dtype=dtype).eval().to(DEVICE)
        for dtype in (torch.float32, torch.bfloat16)
    )
    waves = prompts_of(model.config.vocab_size, seed=2)
    found = run(ensure_sharded(demo, 1), waves, backend, kv_cache_memory=1 << 30)
    prompts = waves[0] | waves[1]
    expected = Expected.of(model, rounded, prompts, found.tokens)
    assert expected.check(found) < 1.4
    if backend in ("flash-attn", "packed"):
        triton = run(ensure_sharded(demo, 1), waves, "triton", kv_cache_memory=1 << 30)
        check_pair(found, triton, prompts, expected)
