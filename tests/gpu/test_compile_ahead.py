"""Kernels that are found without a device are those that an engine launches; and they are compiled where it looks.

Here a CPU takes the place of the GPU, with tensors that have memory, and no kernel is run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.runtime.jit import JITFunction

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import replayed as replayed
from tests.tiny import make_checkpoint
from tests.tiny_predicting import make_copying
from tpctl.bench import synthetic as synthetic_model
from tpctl.bench.shapes import SHAPES
from tpctl.bench.synthetic import synthetic_shards
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners import cuda_steps, outline, predictor_steps, rehearsal
from tpctl.engine.runners.ahead import Ahead
from tpctl.engine.runners.rehearsal import Order, Rehearsal, rehearse
from tpctl.engine.sampling.path import SamplingPath
from tpctl.kernels.common.ahead import KernelSpec, compile_for, unlaunched
from tpctl.kernels.common.launch import DeviceFacts, stand_for
from tpctl.layers.attention.select import make_backend
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]

H200 = DeviceFacts((9, 0), 132, 232448)
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
}
SETTINGS: dict[str, Any] = {"max_num_seqs": 80, "max_num_batched_tokens": 1024, "kv_cache_memory": 64 << 20}


@pytest.fixture
def h200(replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceFacts]:
    """Make the CPU stand for one."""
    monkeypatch.setattr(outline, "make_backend", make_backend)
    if torch.version.cuda is None:  # another than its own would not go with torchvision's
        monkeypatch.setattr(torch.version, "cuda", "12.9")
    before = triton.runtime.driver._active
    stand_for(H200)
    compile_for(H200)
    yield H200
    stand_for(None)
    triton.runtime.driver._active = before


def config_of(family: str, folder: Path, **settings: Any) -> EngineConfig:
    make_checkpoint(family, folder / "hf", **SHAPE)
    shard_checkpoint(folder / "hf", folder / "tp1", 1, dtype="bfloat16")
    return EngineConfig(folder / "tp1", 1, device="cuda", **{**SETTINGS, **settings})


def launched(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> dict[KernelSpec, None]:
    """The kernels of an engine that starts, captures all sizes and answers some requests."""
    sample = cuda_steps.sample

    def zeros(*args: Any, **more: Any) -> Any:
        return tuple(one.zero_() for one in sample(*args, **more))

    monkeypatch.setattr(cuda_steps, "sample", zeros)
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda a, b, *scales, out_dtype, **more: a.new_zeros(len(a), b.shape[1], dtype=out_dtype)
    )
    group = TPGroup()
    group.kind = "cuda"
    specs: dict[KernelSpec, None] = {}
    with unlaunched(specs):
        engine = Engine(config, group)
        runner: Any = engine.runner
        with torch.inference_mode():
            columns = 6 if runner.memory.num_states else 3
            for path in (SamplingPath.DIRECT, SamplingPath.ONE_FLOOR, SamplingPath.TWO_FLOORS):
                for size in runner._graphs.sizes:
                    runner._graphs.run([[0] * size] * columns, False, path)
            for size in (1, 2):
                if runner._paged.is_long(size, runner.loaded.wanted_len):
                    runner._graphs.run([[0] * size] * columns, True)
            for size in (48, 80):
                if runner._paged.shared_pool is not None:
                    runner._graphs.run([[0] * size] * columns, shared=256)
        answer(engine)
    return specs


def test_what_was_found_is_compiled_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, h200: DeviceFacts
) -> None:
    """By the whole way: a process that rehearses, others that compile; then the engine's own launches find it."""
    if torch.cuda.is_initialized():
        pytest.skip("such a process is forked before a GPU is met, and another test here has met it")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    few = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 16, "enforce_eager": True}
    config = config_of("llama3", tmp_path, **few)
    monkeypatch.setattr(Order, "of", lambda config, group, ranks: Order(config, list(ranks), h200, False))
    monkeypatch.setattr(rehearsal, "_PROMPTS", ())
    monkeypatch.setattr(Rehearsal, "_filtered", lambda self, sizes: iter(()))
    said: list[str] = []
    start_compiling(config).wait(said.append)
    specs = [spec for spec, _ in rehearse(Order(config, [0], h200, False))]
    assert len(specs) > 5 and said[-1:] in ([], [f"compiling {len(specs)} kernels"])
    hits: list[bool] = []
    compile = JITFunction._do_compile
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: hits.append(told["cache_hit"]))
    with unlaunched({}), monkeypatch.context() as compiled, torch.no_grad():  # by the calls that launch them
        compiled.setattr(JITFunction, "_do_compile", compile)
        for step in Rehearsal(config, 0, peers=False).steps():
            step()
    assert JITFunction._do_compile is compile
    assert hits == [True] * len(specs)
    again = start_compiling(config)
    again.wait(said.append)
    assert again.missing is None, "what is known to be compiled is not looked at again"


def start_compiling(config: EngineConfig) -> Ahead:
    ahead = Ahead()
    ahead.begin(config, TPGroup(), 1)
    return ahead


def test_an_engine_that_cannot_be_rehearsed_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(Order, "of", lambda config, group, ranks: Order(config, list(ranks), H200, False))
    start_compiling(EngineConfig(tmp_path, 1, device="cuda")).wait(pytest.fail)


def answer(engine: Engine) -> None:
    """Prompts of many lengths, alone and together, then their answers."""
    ways = [{"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}]
    number = 0
    for lengths in ([1], [7], [25], [128], [129], [300], [31] * 5, [700, 90, 17], [40] * 40, [1500], [64] * 70):
        requests = []
        for length in lengths:
            number += 1
            params = SamplingParams(max_tokens=4, ignore_eos=True, **ways[number % 3])
            requests.append(Request(str(number), [(number * 7 + at) % 100 for at in range(length)], params))
        engine.apply(Add(requests))
        engine.step()  # so that some are answered beside the next prompts
        engine.step()
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("policy", ["fcfs", "makespan"])
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_what_is_launched_was_found(
    family: str,
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    h200: DeviceFacts,
) -> None:
    check(config_of(family, tmp_path, scheduling_policy=policy), h200, monkeypatch)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": (
        "gemma-3-12b",
        {
            "head_dim": 64,
            "num_hidden_layers": 6,
            "sliding_window": 96,
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        },
    ),
    "sinks": (
        "gpt-oss-20b",
        {
            "num_hidden_layers": 2,
            "num_local_experts": 8,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixture": ("qwen3-30b-a3b", {"num_hidden_layers": 2, "num_experts": 16, "moe_intermediate_size": 256}),
    "mixture-fp8": ("qwen3-30b-a3b-fp8", {"num_hidden_layers": 2, "num_experts": 16, "moe_intermediate_size": 256}),
    "mixture-int4": ("qwen3-30b-a3b-w4a16", {"num_hidden_layers": 2, "num_experts": 16, "moe_intermediate_size": 256}),
    "latent": ("moonlight-16b-a3b", {"num_hidden_layers": 2, "n_routed_experts": 16, "moe_intermediate_size": 256}),
    "delta-nets": (
        "qwen3.6-35b-a3b",
        {
            "num_hidden_layers": 4,
            "num_experts": 16,
            "moe_intermediate_size": 256,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "fp8": ("llama-3.1-8b-fp8", {}),
    "fp8-block": ("llama-3.1-8b-fp8-block", {}),
    "int4": (  # large enough for codes to come through a ring
        "llama-3.1-8b-w4a16",
        {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 1},
    ),
}
"""Of each kind a model of the benchmarks, and what is smaller than there beside ``SHAPE``."""


def synthetic(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int = 1) -> Path:
    """Shards of one of ``FAMILIES``."""
    base, smaller = FAMILIES[name]
    latent = {"num_key_value_heads": 8} if name == "latent" else {}
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES[base], **SHAPE, "vocab_size": 512, **latent, **smaller})
    monkeypatch.setattr(synthetic_model, "_BLOCK", 1 << 20)
    monkeypatch.setenv("TPCTL_CACHE", str(folder))
    return synthetic_shards("tiny", tp_size).folder


@pytest.mark.daily(5)
@pytest.mark.parametrize("policy", ["fcfs", "makespan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_families_launch_was_found(
    family: str,
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    h200: DeviceFacts,
) -> None:
    config = EngineConfig(
        synthetic(family, tmp_path, monkeypatch), 1, device="cuda", scheduling_policy=policy, **SETTINGS
    )
    check(config, h200, monkeypatch)


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5_text"])
def test_what_a_predictor_launches_was_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, h200: DeviceFacts
) -> None:
    nets = {"linear_num_key_heads": 2, "linear_num_value_heads": 4} if name == "qwen3_5_text" else {}
    make_copying(name, tmp_path / "hf", **{**SHAPE, **nets})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1, dtype="bfloat16")
    accept = predictor_steps.accept

    def zeros(*args: Any) -> Any:
        return tuple(one.zero_() for one in accept(*args))

    monkeypatch.setattr(predictor_steps, "accept", zeros)
    check(EngineConfig(tmp_path / "tp1", 1, device="cuda", speculate="mtp", **SETTINGS), h200, monkeypatch)


def check(config: EngineConfig, facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold what an engine launches against what is found."""
    found = found_by(Order(config, [0], facts, False))
    real = launched(config, monkeypatch)
    late = [spec for spec in real if spec not in found]
    assert len(real) > 40 and not late, "\n".join(nearest(spec, found) for spec in late)


def found_by(order: Order) -> list[KernelSpec]:
    """What is found, all steps having been run."""
    failed: list[Exception] = []
    found = [spec for spec, _ in rehearse(order, failed.append)]
    assert not failed, failed[0]
    return found


@pytest.mark.parametrize("dtype", ["fp8", "packed", "model"])
def test_what_caches_of_other_numbers_launch_was_found(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, h200: DeviceFacts
) -> None:
    def backend(*args: Any, **more: Any) -> Any:
        return make_backend(*args, **{**more, "kv_cache_dtype": dtype})

    monkeypatch.setattr(outline, "make_backend", backend)
    check(config_of("llama3", tmp_path, kv_cache_dtype=dtype), h200, monkeypatch)


def test_what_sees_much_was_found(tmp_path: Path, h200: DeviceFacts) -> None:
    """The last chunks of a prompt, of which each is too small for the kernel that long prompts take."""
    wide = {"head_dim": 128, "num_attention_heads": 16, "num_hidden_layers": 1, "max_position_embeddings": 32768}
    make_checkpoint("llama3", tmp_path / "hf", **{**SHAPE, **wide})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1, dtype="bfloat16")
    few = {"max_num_seqs": 2, "block_size": 128, "enforce_eager": True}
    config = EngineConfig(tmp_path / "tp1", 1, device="cuda", **{**SETTINGS, **few})
    assert "hopper_prefill_kernel" in {spec.name for spec in found_by(Order(config, [0], h200, False))}


@pytest.mark.parametrize("peers", [False, True])
def test_ranks_that_reach_each_other_are_rehearsed_with_sums_in_their_kernels(
    peers: bool, tmp_path: Path, h200: DeviceFacts
) -> None:
    make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp2", 2, dtype="bfloat16")
    config = EngineConfig(tmp_path / "tp2", 2, device="cuda", **SETTINGS)
    both, first = (found_by(Order(config, ranks, h200, peers)) for ranks in ([0, 1], [0]))
    assert set(first) <= set(both)
    sums = {spec.name for spec in both if "collective" in spec.module}
    assert bool(sums) == peers


def nearest(spec: KernelSpec, found: list[KernelSpec]) -> str:
    """What tells a kernel from the one that was found and is most like it."""
    mine = flat(spec)
    others = [flat(one) for one in found if one.name == spec.name]
    differing = [
        {name: (other.get(name), mine[name]) for name in mine if other.get(name) != mine[name]} for other in others
    ]
    return f"{spec.name}: {min(differing, key=len, default=None)}"


def flat(spec: KernelSpec) -> dict[str, Any]:
    """A kernel's arguments by their names: types, values and what is known of them."""
    signature, constants, options, attributes = spec.parts()
    names, found = list(signature), dict(signature) | vars(options)
    for kind, values in (("constant", constants), ("attrs", attributes)):
        found |= {f"{kind} {names[key[0]]}": value for key, value in values.items()}
    return found | {f"attrs {name}": found.get(f"attrs {name}") for name in names}
