"""Logits that an engine samples from, as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpctl.engine.engine import Engine
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.sharding.cutting.shard import shard_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "paced": {"scheduling_policy": "makespan", "max_num_batched_tokens": 1024},
}
"""How a GPU's steps are run; the last captures steps of decodes and prompts together."""


@dataclass
class Run:
    """What one engine made of some prompts."""

    tokens: dict[str, list[int]]
    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """float32 [V] by request and number of tokens before the one that is sampled."""


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
