"""A CPU in the place of a GPU: the engine's host side with kernels in Triton's interpreter. Where a graph would be
replayed its step is run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tpctl.accounting import layer_pools
from tpctl.distributed import TPGroup
from tpctl.engine import engine
from tpctl.engine.engine import Engine
from tpctl.engine.runners import cuda as cuda_runner
from tpctl.engine.runners import cuda_memory, cuda_sizes, cuda_start, outline
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.steps import graphs as cuda_graph
from tpctl.layers.attention.base import AttentionBackend
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.attention.triton_latent import TritonLatentBackend
from tpctl.models.decoder import Decoder
from tpctl.wire.messages import Add, Request
from tpctl.wire.settings import EngineConfig

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
"""One layer, as this is about what is around them: test_compute_cuda has several."""
DIRECT, ONE, TWO, HOST = SamplingPath.DIRECT, SamplingPath.ONE_FLOOR, SamplingPath.TWO_FLOORS, SamplingPath.HOST


_run_largest = cuda_memory._run_largest
_MEASURED: set[str] = set()
"""Models whose largest step was run: what it takes of memory is not known here, and it takes seconds."""


class Event:
    """An event, or a stream, of a device that does everything at once."""

    def __init__(self, *args: Any) -> None:
        pass

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        pass


def own_memory(model: Decoder) -> Decoder:
    """On a CPU weights are views of a file, or packed; on GPUs they have their own memory, aligned."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


class Done(cuda_runner.CudaLaunched):
    def __init__(self, batch: ScheduledBatch, token_ids: list[int], host: Tensor) -> None:
        super().__init__(batch, token_ids, host=host, ready=Event())  # type: ignore[arg-type]


def _run_largest_once(loaded: LoadedModel) -> None:
    if (kind := repr(loaded.config.blueprint)) not in _MEASURED:
        _MEASURED.add(kind)
        _run_largest(loaded)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Hashable]:
    """Make a CPU take the place of the GPU; the keys of the graphs that would have been replayed."""
    keys: list[Hashable] = []
    captured: dict[tuple[int, Hashable], tuple[Tensor, Callable[[], None]]] = {}
    warmed: set[Hashable] = set()

    def run(
        self: cuda_graph.CapturedSteps,
        key: Hashable,
        numbers: list[int],
        make: Callable[[], tuple[Tensor, Callable[[], None]]],
    ) -> None:
        keys.append(key)
        if (id(self), key) not in captured:
            captured[id(self), key] = target, step = make()
            kind = (id(self), key[0] == "mixed", key[-1])  # type: ignore[index]
            if kind not in warmed:  # once, as the interpreter takes seconds for a step
                warmed.add(kind)
                last = self._sampled.clone()
                step()
                self._sampled.copy_(last)
        target, step = captured[id(self), key]
        target.copy_(torch.tensor(numbers, dtype=torch.int32))
        step()

    monkeypatch.setattr(cuda_graph.CapturedSteps, "run", run)
    monkeypatch.setattr(cuda_graph.CapturedSteps, "prepare", lambda self, key, make: make())
    for name in ("Event", "Stream"):
        monkeypatch.setattr(torch.cuda, name, Event)
    monkeypatch.setattr(cuda_runner, "CudaLaunched", Done)
    monkeypatch.setattr(cuda_memory, "_run_largest", _run_largest_once)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 1 << 20)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(cuda_sizes, "_SMALL_PACE", Pace(rows=16, limit=32, chunks=3))
    use = Decoder.use
    monkeypatch.setattr(Decoder, "use", lambda self, compute: use(own_memory(self), compute))
    monkeypatch.setattr(engine, "make_runner", cuda_start.make_cuda_runner)

    def backend(*args: Any, **more: Any) -> AttentionBackend[Any]:
        pools = None if "ranks" not in more else layer_pools(more["ranks"], more["longest"])
        if any(spec.latent is not None for spec in args[3]):
            return TritonLatentBackend(args[3], args[4], pools, args[2])
        return TritonBackend(args[3], args[4], pools=pools)

    monkeypatch.setattr(outline, "make_backend", backend)
    return keys


def start(folder: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "kv_cache_memory": 1 << 20,
        "block_size": 16,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 48,
        "max_model_len": 96,
    }
    return Engine(EngineConfig(folder, 1, **{**defaults, **settings}), TPGroup(0, 1, CPU))


def answered(engine: Engine, *groups: list[Request]) -> dict[str, list[int]]:
    """The answers' tokens of requests, each group handed in when those before have ended."""
    found: dict[str, list[int]] = {request.id: [] for group in groups for request in group}
    for group in groups:
        engine.apply(Add(group))
        finish(engine, found)
    return found


def finish(engine: Engine, found: dict[str, list[int]]) -> None:
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.token_ids
    engine.scheduler.check_integrity()


def best(model: Any, ids: list[int], tokens: list[int]) -> list[int]:
    with torch.no_grad():
        return model(torch.tensor([ids + tokens], device=model.device)).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()


def prompts_of(*lengths: int) -> dict[str, list[int]]:
    torch.manual_seed(4)
    return {str(at): torch.randint(3, 131, (length,)).tolist() for at, length in enumerate(lengths)}
