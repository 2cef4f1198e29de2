"""Models with gated delta nets in fused kernels: an engine's tokens are transformers'."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, INTERPRET
from tests.gpu.stand_in import best, finish, prompts_of, replayed, start  # noqa: F401
from tests.gpu.test_compute_cuda import HOPPER
from tests.looping import make_looping
from tests.tiny import make_mixture
from tpctl import accounting
from tpctl.arch.config import ModelConfig
from tpctl.arch.delta_net import NetSizes
from tpctl.arch.source_plan import build_plan
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners import cuda as cuda_runner
from tpctl.engine.scheduling.scheduled import StateUse
from tpctl.engine.scheduling.speculation import RowCost
from tpctl.engine.steps.mixed import MixedGraphs
from tpctl.engine.steps.states import decode_slots, prompt_chunks
from tpctl.errors import UnsupportedModelError
from tpctl.kernels.delta_net.chunks import ChunkTables
from tpctl.layers.attention.attention import attention_spec
from tpctl.layers.attention.sdpa import SdpaBackend
from tpctl.layers.batch import ForwardBatch, SequenceState, StateTables
from tpctl.layers.compute import Compute
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.layers.delta_net import fused
from tpctl.layers.delta_net.fused import FusedNet
from tpctl.layers.delta_net.layer import DeltaNet
from tpctl.layers.delta_net.state import LayerState
from tpctl.layers.stream import Rows
from tpctl.manifest.manifest import Manifest
from tpctl.models.decoder import Decoder
from tpctl.models.loader import load_shard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def run(engine: Engine, prompts: dict[str, list[int]], count: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {id: [] for id in prompts}
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    engine.apply(Add([Request(id, ids, params) for id, ids in prompts.items()]))
    finish(engine, found)
    return found


@pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine")
@pytest.mark.parametrize(
    ("name", "way"), [("qwen3_next", "graphs"), ("qwen3_5_text", "eager"), ("qwen3_5_moe_text", "graphs")]
)
def test_tokens_equal_transformers(name: str, way: str, tmp_path: Path, replayed: list[Hashable]) -> None:  # noqa: F811
    """Of prompts of all lengths, in chunks, and of those that find states of a prefix."""
    model = make_mixture(name, tmp_path / "hf", **SIZES)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    engine = start(tmp_path / "tp1", kv_cache_memory=4 << 20, enforce_eager=way == "eager")
    prompts = prompts_of(1, 70, 33)
    shared = {"3": [*prompts["1"][:64], 5], "4": prompts["1"], "5": prompts["2"][:33]}
    for some in (prompts, shared):
        for id, tokens in run(engine, some, 3).items():
            assert tokens == best(model, some[id], tokens), id
    assert engine.stats().prefix_cache_hit_tokens > 0
    assert ({key[0] for key in replayed} >= {1}) == (way == "graphs")  # type: ignore[index]
    assert any(isinstance(one, LayerState) for one in engine.runner.kv)


@pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_drafts_engine")
@pytest.mark.daily(2)
@pytest.mark.parametrize("eager", [False, True])
def test_drafts_are_rows_of_a_run(
    eager: bool,
    tmp_path: Path,
    replayed: list[Hashable],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some hold and some do not, across the border of a block."""
    monkeypatch.setattr(cuda_runner, "gpu_cost", lambda loaded: RowCost(0, 0))
    model = make_looping("qwen3_next", tmp_path / "hf", 0.2, **SIZES)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    settings: dict[str, Any] = {"kv_cache_memory": 4 << 20, "max_num_seqs": 12, "enforce_eager": eager}
    engine = start(tmp_path / "tp1", speculate="ngram", **settings)
    prompts = {"0": [5, 6, 7, 8] * 3, "1": [4, 5, 6, 7, 20, 4, 5, 6, 7, 21, 4, 5, 6]}
    found = run(engine, prompts, 12)
    for id, tokens in found.items():
        assert tokens == best(model, prompts[id], tokens), id
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert not eager or not replayed


@pytest.mark.skipif(not INTERPRET, reason="it takes a CPU in the place of the GPU")
@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_short_prompts_are_replayed(name: str, tmp_path: Path, replayed: list[Hashable]) -> None:  # noqa: F811
    """Beside decodes and alone, in chunks, from the states of prefixes, and leaving such states; rows, chunks and
    prompts that pad a step touch no state. Tokens are those of eager launches, and states the same numbers."""
    model = make_mixture(name, tmp_path / "hf", **SIZES)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(5, 40, 70, 3)
    waves = [
        {"0": prompts["0"]},  # each wave comes twice: once its sizes are new, then they are captured
        {"1": prompts["1"], "2": prompts["2"]},
        {"3": [*prompts["2"][:64], *prompts["3"]], "4": [*prompts["2"][:16], 9], "5": [*prompts["1"][:32], 7]},
    ]
    kept = []
    for eager in (False, True):
        engine = start(tmp_path / "tp1", kv_cache_memory=4 << 20, enforce_eager=eager)
        before, found = len(replayed), []
        for turn in range(2):
            for wave in waves:
                some = {id: [3 + (token + turn) % 120 for token in ids] for id, ids in wave.items()}
                found.append(run(engine, some, 2))
                while engine.runner.rest():
                    pass
                for id, tokens in found[-1].items():
                    assert tokens == best(model, some[id], tokens), (eager, turn, id)
        sizes = [key[1:3] for key in replayed[before:] if key[0] == "mixed"]  # type: ignore[index]
        assert {rows for rows, _ in sizes} == (set() if eager else {16, 32, 48}), sizes
        assert all(0 < chunks <= 8 for _, chunks in sizes)
        assert engine.stats().prefix_cache_hit_tokens > 0
        kept.append((found, [state for state in engine.runner.kv if isinstance(state, LayerState)]))
    assert kept[0][0] == kept[1][0]
    for captured, launched in zip(kept[0][1], kept[1][1], strict=True):
        torch.testing.assert_close(captured.matrices, launched.matrices, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(captured.inputs, launched.inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRET, reason="it takes a CPU in the place of the GPU")
def test_the_largest_step_may_share_a_prefix(
    tmp_path: Path,
    replayed: list[Hashable],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has more numbers than any other: where each row has its state, and how long the prefix is."""
    monkeypatch.setattr(cuda_runner, "_SHARED_ROWS", 2)
    monkeypatch.setattr(cuda_runner, "_SHARED_TOKENS", 128)
    monkeypatch.setattr(accounting, "SHORT", 0)  # a step of decodes is the largest
    monkeypatch.setattr(MixedGraphs, "most_numbers", staticmethod(lambda rows, states: 0))
    model = make_mixture("qwen3_next", tmp_path / "hf", max_position_embeddings=256, **SIZES)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 144, "max_model_len": 160}
    engine = start(tmp_path / "tp1", kv_cache_memory=4 << 20, **sizes)
    (prefix,) = prompts_of(137).values()
    for some in ({"0": prefix}, {"1": [*prefix[:129], 7], "2": [*prefix[:130], 9, 11]}):
        for id, tokens in run(engine, some, 2).items():
            assert tokens == best(model, some[id], tokens), id
    assert any(key[0] == 2 and key[2] for key in replayed), replayed  # type: ignore[index]


def layer_of(folder: Path, group: TPGroup, compute: Compute) -> DeltaNet:
    """The first layer of a rank of a model, loaded."""
    manifest, config = Manifest.load(folder), ModelConfig.load(folder)
    made_of = config.blueprint
    backend = SdpaBackend([attention_spec(one, group.rank, group.size) for one in made_of.attentions], 16)  # type: ignore[arg-type]
    with torch.device("meta"):
        rotaries = [None] * len(made_of.blocks)
        model = Decoder(made_of, build_plan(config, group.size), backend, rotaries, group, torch.float32)
    files = [folder / name for name in manifest.rank_files(group.rank)]
    load_shard(model, files, DEVICE, {name for name, one in manifest.tensors(group.rank).items() if one.fill})
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.use(compute)
    return model.model.layers[0].linear_attn


STATES = [  # decodes of sequences that begin, and that go on; prompts likewise
    (1, 1, SequenceState(0, None)),
    (1, 30, SequenceState(1, 5, ((1, 2),))),
    (70, 70, SequenceState(3, None, ((64, 6),))),
    (2, 50, SequenceState(4, 4, ((1, 7),))),
]


def a_step(sizes: NetSizes) -> tuple[ForwardBatch, LayerState, LayerState]:
    """Of ``STATES``, with states as plain torch has them, and as kernels do."""
    lens, ends, states = (list(column) for column in zip(*STATES, strict=True))
    decodes, before = 2, sizes.taps - 1
    plain = LayerState.allocate(sizes, 8, torch.float32, DEVICE)
    plain.matrices.normal_()
    plain.inputs[:, :before].normal_()
    fused = LayerState(plain.matrices.clone(), torch.zeros_like(plain.inputs))
    for count, end, state in STATES:
        if state.source is not None:
            rows = [(end - count - before + at) % sizes.taps for at in range(before)]
            fused.inputs[state.source, rows] = plain.inputs[state.source, :before]
    items: list[Any] = [
        SimpleNamespace(state=StateUse(*state), num_new_tokens=count, start=end - count, drafts=())
        for count, end, state in STATES
    ]
    made = prompt_chunks(items[decodes:], decodes)

    def table(columns: list[list[int]]) -> Tensor:
        return torch.tensor(columns, dtype=torch.int32, device=DEVICE)

    chunks = ChunkTables(table(made.chunks), table(made.sequences), made.groups)
    tables = StateTables(table(decode_slots(items[:decodes])), chunks)
    ids, ends_S = torch.zeros(sum(lens), dtype=torch.int64, device=DEVICE), table(ends)
    batch = ForwardBatch(ids, ids, (), lens, ends, decodes, ids, None, ends_S, states=states, state_tables=tables)
    return batch, plain, fused


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
@pytest.mark.parametrize(
    ("name", "tp_size", "rank"),
    [("qwen3_next", 1, 0), ("qwen3_next", 4, 0), ("qwen3_5_text", 3, 1), ("qwen3_5_moe_text", 3, 2)],
)
def test_a_ranks_layer(
    name: str, tp_size: int, rank: int, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven cuts included, with the projections in one linear, and apart, as those of codes are."""
    make_mixture(name, tmp_path / "hf", num_hidden_layers=1, layer_types=["linear_attention"])
    shard_checkpoint(tmp_path / "hf", tmp_path / "shards", tp_size)
    group = TPGroup(rank, tp_size, DEVICE)
    if apart:
        monkeypatch.setattr(fused, "_merged", lambda device, linears: None)
    plain, made = (
        layer_of(tmp_path / "shards", group, one) for one in (Compute(group), CudaCompute(group, facts=HOPPER))
    )
    batch, before, after = a_step(plain.sizes)
    rows = Rows(torch.randn(batch.num_tokens, 64, device=DEVICE))
    plan: Any = SimpleNamespace(batch=batch)
    with torch.inference_mode():
        want, found = plain(rows, before, plan), made(rows, after, plan)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.matrices[:8], before.matrices, rtol=1e-4, atol=1e-5)
    past = plain.sizes.taps - 1
    for count, end, state in STATES:
        for number, slot in (*state.keeps, (count, state.slot)):
            at = [(end - count + number - past + back) % plain.sizes.taps for back in range(past)]
            torch.testing.assert_close(after.inputs[slot, at], before.inputs[slot, :past], rtol=1e-5, atol=1e-6)


def test_heads_that_no_program_holds_are_refused() -> None:
    net: Any = SimpleNamespace(sizes=NetSizes(1, 1, 256, 256, 4), norms=[None])
    with pytest.raises(
        UnsupportedModelError, match=r"heads of 256 x 256 dimensions do not run on a GPU, .* --device cpu"
    ):
        FusedNet(CudaCompute(TPGroup(0, 1, DEVICE), facts=HOPPER), net)
