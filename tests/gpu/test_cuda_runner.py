"""The GPU engine's host side without a GPU: the runner, its slots, the ladder and the pace, with kernels in Triton's
interpreter. Where a graph would be replayed its step is run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.tiny import LONG_ROPES, make_broken, make_checkpoint
from tpctl.accounting import RESERVE, KvLayout, layer_pools
from tpctl.distributed import TPGroup
from tpctl.engine import engine
from tpctl.engine.engine import Engine
from tpctl.engine.memory.gpu import GpuShare
from tpctl.engine.runners import cuda as cuda_runner
from tpctl.engine.runners import cuda_sizes, loading, outline
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.sampling.sampler import Sampler, SamplingRow
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.scheduling.speculation import RowCost
from tpctl.engine.steps import graphs as cuda_graph
from tpctl.errors import EngineError
from tpctl.layers.attention.triton import TritonBackend
from tpctl.models.decoder import Decoder
from tpctl.partition.cuts import Range
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Abort, Add, Request
from tpctl.wire.report import TokenLogprob
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
"""One layer, as this is about what is around them: test_compute_cuda has several."""


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


MIXED = ["sliding_attention", "full_attention"]
DIRECT, ONE, TWO, HOST = SamplingPath.DIRECT, SamplingPath.ONE_FLOOR, SamplingPath.TWO_FLOORS, SamplingPath.HOST
PACKAGE = Path(engine.__file__).parent.parent


class Done(cuda_runner.CudaLaunched):
    def __init__(self, batch: ScheduledBatch, token_ids: list[int], host: Tensor) -> None:
        super().__init__(batch, token_ids, host=host, ready=Event())  # type: ignore[arg-type]


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
    monkeypatch.setattr(engine, "make_runner", cuda_runner.make_cuda_runner)

    def backend(*args: Any, **more: Any) -> TritonBackend:
        return TritonBackend(args[3], args[4], pools=layer_pools(more["ranks"], more["longest"]))

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


@pytest.mark.daily(2)
@pytest.mark.parametrize("way", ["graphs", "eager", "paced", "tight"])
def test_tokens_equal_transformers(way: str, tmp_path: Path, replayed: list[Hashable]) -> None:
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(3, 17, 36, 9, 50, 9)
    prompts["5"] = prompts["2"][:32] + prompts["5"]  # a shared prefix
    if way == "tight":  # each fits into a block, their answers not
        prompts = prompts_of(14, 15, 15)
    bytes_a_block = SHAPE["num_hidden_layers"] * 2 * 2 * 16 * 16 * 4
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
        "tight": {"kv_cache_memory": 6 * bytes_a_block},
    }[way]
    engine = start(tmp_path / "tp1", **settings)
    lengths = dict.fromkeys(prompts, 20 if way == "tight" else 4)
    if way == "paced":
        lengths["0"] = 12  # worth waiting for
    requests = [
        Request(id, ids, SamplingParams(max_tokens=lengths[id], ignore_eos=True)) for id, ids in prompts.items()
    ]
    found: dict[str, list[int]] = {id: [] for id in prompts}
    engine.apply(Add(requests))
    finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
        assert len(found[id]) == lengths[id]
    decodes = {key for key in replayed if key[0] != "mixed"}  # type: ignore[index]
    assert (len(decodes) > 0) == (way != "eager")
    assert decodes <= {(size, False, False, DIRECT) for size in (1, 2, 4, 6)}
    assert any(key[0] == "mixed" for key in replayed) == (way == "paced")  # type: ignore[index]
    stats = engine.scheduler.stats
    assert (stats.preemptions > 0) == (way == "tight")
    assert (stats.paced_steps > 0) == (way == "paced")


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_short_prompts_are_replayed_once_their_size_has_come(
    name: str, tmp_path: Path, replayed: list[Hashable]
) -> None:
    """Alone, beside decodes, behind a cached prefix, and in chunks."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 18} if name == "gemma3" else {}
    model = make_checkpoint(name, tmp_path / "hf", **{**SHAPE, "num_hidden_layers": 2, **layers})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    engine = start(tmp_path / "tp1", max_num_batched_tokens=32)
    lengths = prompts_of(5, 20, 40, 30, 7)
    lengths["3"] = lengths["2"][:32] + lengths["3"]

    def ask(turn: int, *together: str) -> list[Hashable]:
        """The sizes of prompts that were replayed."""
        prompts = {f"{turn}-{id}": [3 + (token + turn) % 120 for token in lengths[id]] for id in together}
        found: dict[str, list[int]] = {id: [] for id in prompts}
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        before = len(replayed)
        engine.apply(Add([Request(id, ids, params) for id, ids in prompts.items()]))
        finish(engine, found)
        while engine.runner.rest():
            pass
        for id, ids in prompts.items():
            assert found[id] == best(model, ids, found[id]), id
        return [key[1] for key in replayed[before:] if key[0] == "mixed"]  # type: ignore[index]

    assert ask(1, "0") == []
    assert ask(2, "4") == [16]
    ask(3, "1", "2", "3")
    assert ask(4, "3", "0", "2", "1").count(32) >= 3


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_prefix_that_all_share_is_read_once(
    name: str, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_runner, "_SHARED_ROWS", 3)
    monkeypatch.setattr(cuda_runner, "_SHARED_TOKENS", 128)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 18} if name == "gemma3" else {}
    shape = {**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 512, **layers}
    model = make_checkpoint(name, tmp_path / "hf", **shape)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    engine = start(tmp_path / "tp1", max_model_len=256, max_num_batched_tokens=256, kv_cache_memory=4 << 20)
    (prefix,) = prompts_of(140).values()
    prompts = {"first": prefix[:137]} | {
        id: prefix[: 128 + at] + own for at, (id, own) in enumerate(prompts_of(5, 20, 3).items())
    }
    found: dict[str, list[int]] = {id: [] for id in prompts}
    for together in (["first"], [id for id in prompts if id != "first"]):
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.apply(Add([Request(id, prompts[id], params) for id in together]))
        finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    assert (4, False, True, DIRECT) in replayed
    assert engine.stats().prefix_cache_hit_tokens >= 3 * 128


@pytest.mark.parametrize("blocks,common", [
    ([[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]], 2),
    ([[1, 2, 3], [1, 9, 4], [1, 2, 6]], 1),
    ([[1, 2, 3], [7, 2, 4], [8, 2, 6]], 0),
    ([[1, 2, 3], [7, 2, 4], [1, 2, 6]], 0),
    ([[1], [1, 2]], 0),
])  # fmt: skip
def test_how_many_blocks_are_shared(blocks: list[list[int]], common: int) -> None:
    assert cuda_runner.shared_blocks(blocks) == common


@pytest.mark.daily(2)
@pytest.mark.parametrize(("way", "block_size", "window"), [("graphs", 16, 18), ("eager", 32, 15), ("paced", 16, 18)])
def test_layers_with_windows_keep_what_they_see(
    way: str, block_size: int, window: int, tmp_path: Path, replayed: list[Hashable]
) -> None:
    """In a pool of their own, of which blocks go from one sequence to the next, whose content would be seen."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**SHAPE, "num_hidden_layers": 3, "layer_types": layers, "sliding_window": window}
    model = make_checkpoint("gemma3", tmp_path / "hf", **shape)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(50, 3, 5, 35)
    prompts["2"] = prompts["0"][:32] + prompts["2"]  # a shared prefix
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
    }[way]
    engine = start(tmp_path / "tp1", block_size=block_size, max_num_seqs=2, max_model_len=64, **settings)
    assert engine.runner.loaded.layout == KvLayout(block_size, (None, window), (2, 1))
    lengths = dict.fromkeys(prompts, 3)
    lengths["0"] = 10
    requests = [
        Request(id, ids, SamplingParams(max_tokens=lengths[id], ignore_eos=True)) for id, ids in prompts.items()
    ]
    found: dict[str, list[int]] = {id: [] for id in prompts}
    for some in (requests[:2], requests[2:]):
        engine.apply(Add(some))
        finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
        assert len(found[id]) == lengths[id]
    assert engine.stats().prefix_cache_hit_tokens == 32
    assert len(replayed) > 0 or way == "eager"


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Heads of two sizes in two pools, and a layer that reads another's keys.
        ("gemma4-text-edge", {"layer_types": [*MIXED, "full_attention"], "num_kv_shared_layers": 1}),
        ("gemma4-text-moe", {"layer_types": MIXED}),
        ("ministral3-window", {"num_hidden_layers": 1}),
    ],
)
def test_attention_of_other_kinds(name: str, sizes: dict[str, Any], tmp_path: Path, replayed: list[Hashable]) -> None:
    """In captured steps and in one with a prefix that is found."""
    sizes |= {"num_hidden_layers": len(sizes["layer_types"])} if "layer_types" in sizes else {}
    model = make_checkpoint(name, tmp_path / "hf", **sizes)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(35, 3, 5)
    prompts["2"] = prompts["0"][:32] + prompts["2"]  # a shared prefix
    engine = start(tmp_path / "tp1", max_num_seqs=2, max_model_len=64)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    requests = [Request(id, ids, params) for id, ids in prompts.items()]
    found: dict[str, list[int]] = {id: [] for id in prompts}
    for some in (requests[:2], requests[2:]):
        engine.apply(Add(some))
        finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    assert engine.stats().prefix_cache_hit_tokens == 32
    assert len(replayed) > 0


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("params", "eager"),
    [
        ({}, False),
        ({"temperature": 0.05}, True),
        ({"temperature": 0.05, "logprobs": 1, "repetition_penalty": 1.01}, False),
    ],
)
def test_drafts_are_rows_of_a_decode(
    params: dict[str, Any], eager: bool, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are those without speculation, on the device as with the host's help, in captured steps and without."""
    monkeypatch.setattr(cuda_runner.CudaRunner, "row_cost", RowCost(0, 0))
    make_checkpoint("qwen3", tmp_path / "hf", **{**SHAPE, "num_hidden_layers": 1})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = {"0": [5, 6, 7, 8] * 4, "1": [9, 9, 9]}
    requests = [
        Request(id, ids, SamplingParams(max_tokens=9, ignore_eos=True, seed=int(id), **params))
        for id, ids in prompts.items()
    ]
    answers: dict[str, dict[str, list[int]]] = {}
    for way in ("off", "ngram"):
        replayed.clear()
        engine = start(tmp_path / "tp1", speculate=way, max_num_seqs=8, enforce_eager=eager)
        answers[way] = {id: [] for id in prompts}
        engine.apply(Add(requests))
        finish(engine, answers[way])
    stats = engine.stats()
    assert answers["ngram"] == answers["off"]
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.steps < 9
    sizes = {key[0] for key in replayed}  # type: ignore[index]
    assert not sizes if eager else max(sizes) > 4


def test_slots_are_taken_over(tmp_path: Path, replayed: list[Hashable]) -> None:
    """Requests come and go, one is aborted while a step of its runs, and each has its own seed and temperature."""
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(5, 20, 33, 4, 18)
    greedy = SamplingParams(max_tokens=3, ignore_eos=True)
    warm = SamplingParams(max_tokens=5, temperature=0.8, seed=11, ignore_eos=True)
    alone: dict[str, list[int]] = {"warm": []}
    engine = start(tmp_path / "tp1", max_num_seqs=2)
    engine.apply(Add([Request("warm", prompts["1"], warm)]))
    finish(engine, alone)
    found: dict[str, list[int]] = {**{id: [] for id in prompts}, "warm": [], "gone": []}
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    engine.apply(Add([Request("gone", prompts["2"], long), Request("warm", prompts["1"], warm)]))
    for _ in range(4):
        for output in engine.step():
            found[output.id] += output.token_ids
    for output in engine.apply(Abort(["gone"])):
        assert output.finish_reason == "abort"
    engine.apply(Add([Request(id, ids, greedy) for id, ids in prompts.items()]))
    finish(engine, found)
    assert found["warm"] == alone["warm"]
    assert found["warm"] != best(model, prompts["1"], found["warm"])  # it was not greedy
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    assert 0 < len(found["gone"]) < 40


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_log_probabilities_are_sampled_on_the_host(
    settings: dict[str, Any], tmp_path: Path, replayed: list[Hashable]
) -> None:
    """Beside requests that the device samples alone, and behind a step whose tokens are not back yet."""
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(5, 20)
    engine = start(tmp_path / "tp1", **settings)
    plain = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.apply(Add([Request("0", prompts["0"], plain)]))
    found: dict[str, list[int]] = {id: [] for id in prompts}
    logprobs: list[TokenLogprob] = []
    for step in range(40):
        if step == 3:
            wanted = SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True)
            engine.apply(Add([Request("1", prompts["1"], wanted)]))
        for output in engine.step():
            found[output.id] += output.token_ids
            logprobs += output.logprobs or []
    assert not engine.has_work
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id])
    with torch.no_grad():
        logits = model(torch.tensor([prompts["1"] + found["1"]])).logits[0, len(prompts["1"]) - 1 : -1]
    expected = logits.log_softmax(-1).amax(-1)
    assert len(logprobs) == 3
    assert ((2, False, False, HOST) in replayed) == ("enforce_eager" not in settings)  # up to the logits it is captured
    for (chosen, top), want, token in zip(logprobs, expected.tolist(), found["1"], strict=True):
        assert chosen == pytest.approx(want, abs=1e-4)
        assert top[0] == (token, chosen)
        assert len(top) == 2


FILTERED = {
    "0": SamplingParams(max_tokens=10, ignore_eos=True, top_p=0.5),
    "1": SamplingParams(temperature=1.5, top_k=9, seed=2, max_tokens=4, ignore_eos=True),
    "2": SamplingParams(temperature=1.2, top_k=30, top_p=0.9, seed=3, max_tokens=6, ignore_eos=True),
    "3": SamplingParams(temperature=2.0, min_p=0.3, seed=4, max_tokens=4, ignore_eos=True),
    "4": SamplingParams(temperature=0.9, top_p=0.7, seed=1, max_tokens=4, ignore_eos=True),
    "5": SamplingParams(temperature=0.8, seed=5, max_tokens=4, ignore_eos=True),
}


@pytest.mark.daily(2)
@pytest.mark.parametrize("way", ["graphs", "paced"])
def test_the_device_samples_within_filters(way: str, tmp_path: Path, replayed: list[Hashable]) -> None:
    """The tokens that the CPU's sampler chooses, one request at a time, from whole logits."""
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(3, 17, 36, 9, 50, 9)
    engine = start(tmp_path / "tp1", scheduling_policy="makespan" if way == "paced" else "fcfs")
    engine.runner.sampler.sample = None  # nothing asks it
    found: dict[str, list[int]] = {id: [] for id in prompts}
    engine.apply(Add([Request(id, ids, FILTERED[id]) for id, ids in prompts.items()]))
    finish(engine, found)
    vocab = engine.runner.loaded.config.vocab_size
    sampler = Sampler(TPGroup(), [Range(0, vocab)], vocab)
    for id, ids in prompts.items():
        with torch.no_grad():
            logits = model(torch.tensor([ids + found[id]])).logits[0, len(ids) - 1 : -1]
        rows = [SamplingRow(FILTERED[id], len(ids) + at) for at in range(len(found[id]))]
        assert found[id] == sampler.sample(logits, rows)[0], id
        assert len(found[id]) == FILTERED[id].max_tokens
    assert any(key[0] == "mixed" and key[-1] is TWO for key in replayed) == (way == "paced")  # type: ignore[index]
    assert {TWO} <= {key[-1] for key in replayed} <= {DIRECT, ONE, TWO}  # type: ignore[index]


BROKEN = 100


@pytest.mark.daily(2)
@pytest.mark.parametrize("way,helped", [("graphs", False), ("eager", True), ("paced", True)])
def test_rows_that_are_not_finite_end_and_others_go_on(
    way: str, helped: bool, tmp_path: Path, replayed: list[Hashable]
) -> None:
    """In every kind of step; the one after, which is under way already, is wasted on them. test_engine has all ways to
    sample in each."""
    make_broken("qwen3", tmp_path / "hf", BROKEN, **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = {
        id: [token if token != BROKEN else 3 for token in ids] for id, ids in prompts_of(3, 17, 36, 9, 50, 9).items()
    }
    more = {"logprobs": 2, "presence_penalty": 0.1, "min_tokens": 2} if helped else {}
    params = {id: replace(FILTERED[id], **more) for id in prompts}
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
    }[way]
    clean = [Request(id, ids, params[id]) for id, ids in prompts.items()]
    want: dict[str, list[int]] = {id: [] for id in prompts}
    engine = start(tmp_path / "tp1", **settings)
    engine.apply(Add(clean))
    finish(engine, want)
    assert all(len(want[id]) == FILTERED[id].max_tokens for id in prompts)
    engine = start(tmp_path / "tp1", **settings)
    if not helped:
        engine.runner.sampler.sample = None  # nothing asks it
    broken = [
        Request("broken 0", [*prompts["2"][:34], BROKEN], params["0"]),
        Request("broken 2", [*prompts["2"], BROKEN, 7], params["2"]),
        Request("broken 5", [BROKEN], params["5"]),
    ]
    engine.apply(Add([broken[0], *clean[:3], broken[1], *clean[3:], broken[2]]))
    found: dict[str, list[int]] = {id: [] for id in [*prompts, "broken 0", "broken 2", "broken 5"]}
    errors: dict[str, str | None] = {}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.token_ids
            if output.finish_reason == "error":
                errors[output.id] = output.message
    engine.scheduler.check_integrity()
    assert {id: found[id] for id in prompts} == want
    assert sorted(errors) == ["broken 0", "broken 2", "broken 5"]
    for request in broken:
        assert found[request.id] == []
        assert f"not finite at position {len(request.token_ids)}: " in (errors[request.id] or "")


@pytest.mark.parametrize("way", ["graphs", "paced"])
def test_long_rope_changes_its_table_between_steps_that_overlap(
    way: str, tmp_path: Path, replayed: list[Hashable]
) -> None:
    shape = {**SHAPE, "rope_parameters": LONG_ROPES[8]}
    model = make_checkpoint("phi3-long-rope", tmp_path / "hf", **{k: v for k, v in shape.items() if k != "head_dim"})
    model.generation_config.eos_token_id = None
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(20, 22, 23, 24, 25, 40)
    prompts["1"] = prompts["5"][:22]
    engine = start(tmp_path / "tp1", scheduling_policy="makespan" if way == "paced" else "fcfs")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.apply(Add([Request(id, ids, params) for id, ids in prompts.items()]))
    found: dict[str, list[int]] = {id: [] for id in prompts}
    finish(engine, found)
    for id, prompt in prompts.items():
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert found[id] == answer[0, len(prompt) :].tolist(), id


def test_the_cache_gets_what_nothing_else_needs(
    tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    gib = 1 << 30
    share, taken = [GpuShare(80 * gib, 79 * gib, 0.5)], 3 * gib
    monkeypatch.setattr(loading, "_share", lambda settings, group, nbytes: share[0])
    monkeypatch.setattr(GpuShare, "taken", lambda self, device: taken)
    engine = start(tmp_path / "tp1", kv_cache_memory=None)
    runner: Any = engine.runner
    assert runner.memory.num_blocks == 6 * 96 // 16  # more would never be used
    later, config = runner.steps.later, runner.loaded.config
    tables = 4 * (2 * 6 + cuda_sizes.largest_rows(runner.loaded.settings, runner.pace)) * 96 // 16
    # And the logits of a captured step, its activations, and what sampling with the host's help takes.
    assert later > tables + 6 * config.vocab_size * 4 + runner.sampler.working_bytes(6)
    block = runner.loaded.slab_bytes
    rest = taken + later + RESERVE
    share[0] = GpuShare(80 * gib, rest + 10 * block + block // 2, 1.0)
    assert start(tmp_path / "tp1", kv_cache_memory=None).runner.memory.num_blocks == 10
    share[0] = GpuShare(80 * gib, rest, 1.0)
    with pytest.raises(EngineError, match=r"nothing is left for the KV cache: of .* 80\.0 GiB rank 0 may take 3\.5"):
        start(tmp_path / "tp1", kv_cache_memory=None)


def test_a_decode_step_can_be_read_through(tmp_path: Path, replayed: list[Hashable]) -> None:
    """All that runs in one step of decodes, from the scheduler to its tokens: docs/a-decode-step.md in lines.

    Counted are the functions whole, docstrings included; of kernels what launches them, not what a GPU runs.
    """
    make_checkpoint("llama3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    made = start(tmp_path / "tp1")
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    made.apply(Add([Request(id, ids, params) for id, ids in prompts_of(5, 20).items()]))
    for _ in range(3):
        made.step()
    spans: dict[tuple[str, int], int] = {}

    def trace(frame: FrameType, event: str, given: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            owner = frame.f_globals.get(code.co_name)
            if owner is None or inspect.isfunction(owner):  # and none that Triton has compiled
                spans[code.co_filename, code.co_firstlineno] = len(inspect.getsource(code).splitlines())

    before = len(replayed)
    sys.setprofile(trace)
    try:
        made.step()
    finally:
        sys.setprofile(None)
    assert len(replayed) == before + 1
    files: dict[str, int] = {}
    for (file, _), lines in spans.items():
        name = str(Path(file).relative_to(PACKAGE))
        files[name] = files.get(name, 0) + lines
    print(*(f"{lines:5} {name}" for name, lines in sorted(files.items(), key=lambda item: -item[1])), sep="\n")
    assert {"engine/scheduling/scheduler.py", "models/decoder.py", "layers/stream_cuda.py"} <= files.keys()
    assert sum(files.values()) <= 1200
