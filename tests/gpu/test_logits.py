"""The logits that tokens are sampled from, in bfloat16, against float32: every backend, on random lengths, shared
prefixes, and block tables in random order.

What rounding may do to a model is measured and not guessed: transformers' own bfloat16 model is as far from float32 as
that dtype takes one, and nothing here may be much further.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_engine import CHANGES, WIDE
from tests.tiny import make_checkpoint
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.layers.attention.flash import installed_flash_attention
from tpctl.sharding.cache import ensure_sharded
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "packed", "sdpa", "flash-attn")
"""Of attention, each with keys and values as they are; ``packed``: triton with ``kernels.attention.packed_kv``."""
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "paced": {"scheduling_policy": "makespan", "max_num_batched_tokens": 1024},
}
"""How a GPU's steps are run; the last captures steps of decodes and prompts together."""

# flash-attn takes blocks of 256 tokens, so prefixes are longer than that and prompts longer than most.
PREFIX, LONGEST, TOKENS = 300, 800, 12


@dataclass
class Run:
    """What one engine made of some prompts."""

    tokens: dict[str, list[int]]
    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """float32 [V] by request and number of tokens before the one that is sampled."""


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


def record(engine: Engine, rows: int) -> dict[tuple[str, int], Tensor]:
    """Fills, as the engine runs, with the logits of every token that it samples (see ``Run.logits``).

    They are copied where the sampler reads them, which a captured step does again whenever it is replayed.
    """
    runner: Any = engine.runner
    vocab = runner.loaded.config.vocab_size
    tape = torch.zeros(rows, runner.model.lm_head.out_features, dtype=runner.loaded.dtype, device=DEVICE)
    found: dict[tuple[str, int], Tensor] = {}

    def taped(original: Callable[..., Any]) -> Callable[..., Any]:
        def sample(logits: Tensor, *more: Any) -> Any:
            tape[: logits.shape[0], : logits.shape[1]].copy_(logits)
            return original(logits, *more)

        return sample

    if hasattr(runner, "_on_device"):
        runner._on_device.sample = taped(runner._on_device.sample)
    runner.sampler.sample = taped(runner.sampler.sample)
    launch = runner.launch

    def launched(batch: ScheduledBatch) -> Any:
        result = launch(batch)
        for row, item in enumerate(batch.sampled):
            found[item.sequence.id, item.end] = tape[row, :vocab].float()
        return result

    runner.launch = launched
    return found


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


@dataclass
class Expected:
    """transformers' logits for one run, and how far bfloat16 takes transformers itself from them."""

    logits: dict[tuple[str, int], Tensor]
    noise: dict[tuple[str, int], float]

    @staticmethod
    def of(model: Any, rounded: Any, prompts: dict[str, list[int]], tokens: dict[str, list[int]]) -> Expected:
        expected = Expected({}, {})
        for id, ids in prompts.items():
            with torch.inference_mode():
                whole = torch.tensor([ids + tokens[id]], device=DEVICE)
                exact, coarse = (m(whole).logits[0, len(ids) - 1 : -1].float() for m in (model, rounded))
            for step, (want, got) in enumerate(zip(exact, coarse, strict=True)):
                expected.logits[id, len(ids) + step] = want
                expected.noise[id, len(ids) + step] = rms(got - want)
        return expected

    def check(self, found: Run) -> float:
        """The root mean square of all errors, in units of transformers' own."""
        assert found.logits.keys() == self.logits.keys()
        errors = {key: rms(found.logits[key] - want) for key, want in self.logits.items()}
        usual = mean_square(self.noise.values())
        print(f"  error {mean_square(errors.values()) / usual:.2f} of noise {usual:.4f}, deviation", end=" ")
        print(f"{float(torch.stack(list(self.logits.values())).std()):.2f}, worst row", end=" ")
        print(f"{max(errors[key] / max(self.noise[key], usual) for key in errors):.2f}")
        for key, error in errors.items():
            assert error < 6 * max(self.noise[key], usual), key
        return mean_square(errors.values()) / usual


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def mean_square(values: Any) -> float:
    values = list(values)
    return float((sum(value**2 for value in values) / len(values)) ** 0.5)


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


def rounded_too(model: Any, folder: Path) -> tuple[Any, Any]:
    """A model that was saved in ``folder``, its weights rounded, and the same in bfloat16; a shard is left there."""
    from transformers import AutoModelForCausalLM

    # As the engine holds it: what is compared is arithmetic, not how the weights were rounded.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder / "hf")
    shard_checkpoint(folder / "hf", folder / "tp1", 1, dtype="bfloat16")
    rounded = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    rounded.config._experts_implementation = "eager"  # the others want rows of whole 16 bytes
    return model.to(DEVICE), rounded.to(DEVICE)


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
