"""The memory planner: its weight bytes are what sharding writes, and its verdicts follow from its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.packers import fp8
from tests.unit.synthetic import RUN, make_checkpoint, make_config
from tpctl.accounting import reserve
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.safetensors import TensorSpec, build_header, read_header, tensor_nbytes
from tpctl.errors import CheckpointError, PartitionError, UsageError
from tpctl.manifest.manifest import Manifest
from tpctl.partition.plan import PlannedTensor
from tpctl.partition.split import TensorSplit
from tpctl.planning.fit import Budget, FitReport, plan_model
from tpctl.sharding.cutting.shard import shard_checkpoint

LLAMA_405B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 53248,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}


def config_folder(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(folder: Path, **options: Any) -> FitReport:
    tp_size, dtype = options.pop("tp_size", None), options.pop("dtype", "auto")
    return plan_model(read_metadata(str(folder)), Budget(**options), tp_size=tp_size, dtype=dtype)


@pytest.mark.daily(3)
@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", RUN)
def test_bytes_are_what_sharding_writes(tmp_path: Path, family: str, tied: bool) -> None:
    config = make_config(family, tie_word_embeddings=tied)
    source = make_checkpoint(tmp_path / "source", config)
    alone = config_folder(tmp_path / "alone", config)
    for tp_size, dtype in ((1, "auto"), (2, "auto"), (3, "float32"), (4, "auto")):
        out = tmp_path / f"tp{tp_size}"
        written = shard_checkpoint(source, out, tp_size, dtype=dtype)
        manifest = Manifest.load(out)
        for folder in (source, alone, out):
            report = planned(folder, tp_size=tp_size, dtype=dtype)
            assert report.exact == (folder != alone)
            assert {rank.rank: rank.file_bytes for rank in report.ranks} == written.bytes_per_rank
            for rank in report.ranks:
                tensors = manifest.tensors(rank.rank).values()
                assert rank.weight_bytes == sum(tensor_nbytes(t.dtype, t.shape) for t in tensors)
            size = next(size for size in report.sizes if size.tp_size == tp_size)
            sizes = [rank.weight_bytes for rank in report.ranks]
            assert size.weight_bytes == max(sizes)
            assert size.imbalance == pytest.approx(max(sizes) * tp_size / sum(sizes))


@pytest.mark.parametrize("family", RUN)
def test_bytes_of_several_parts_are_what_sharding_writes(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part has a header of its own, so where parts end shows in the bytes."""
    monkeypatch.setattr("tpctl.planning.model_sizes.DEFAULT_PART_SIZE", 3000)
    source = make_checkpoint(tmp_path / "source", make_config(family))
    for tp_size in (1, 3):
        written = shard_checkpoint(source, tmp_path / f"tp{tp_size}", tp_size, max_part_size=3000)
        assert written.files > 3 * tp_size
        report = planned(source, tp_size=tp_size)
        assert {rank.rank: rank.file_bytes for rank in report.ranks} == written.bytes_per_rank


def test_layers_of_different_dtypes_are_counted_each(tmp_path: Path) -> None:
    """A checkpoint may keep a layer wider than the others; no layer stands for another's bytes."""
    source = make_checkpoint(tmp_path / "source", make_config())
    path = source / "model.safetensors"
    infos, raw = read_header(path).tensors, path.read_bytes()
    wide = {name for name in infos if name.startswith("model.layers.1.mlp.")}
    header = build_header(TensorSpec(n, "F32" if n in wide else t.dtype, t.shape) for n, t in infos.items())
    data = (raw[infos[n].start : infos[n].stop] * (2 if n in wide else 1) for n in header.tensors)
    path.write_bytes(header.raw + b"".join(data))
    written = shard_checkpoint(source, tmp_path / "out", 2)
    report = planned(source, tp_size=2)
    assert {rank.rank: rank.file_bytes for rank in report.ranks} == written.bytes_per_rank
    manifest = Manifest.load(tmp_path / "out")
    weights = max(
        sum(tensor_nbytes(t.dtype, t.shape) for t in manifest.tensors(rank).values()) for rank in manifest.shards
    )
    assert max(rank.weight_bytes for rank in report.ranks) == weights
    assert next(size for size in report.sizes if size.tp_size == 2).weight_bytes == weights


def test_the_stored_dtype_counts_as_in_the_engine(tmp_path: Path) -> None:
    """The config says bfloat16; the engine runs, and caches, what the head is stored in."""
    source = make_checkpoint(tmp_path / "source", make_config(), dtype="F32")
    report = planned(source, tp_size=2)
    assert [rank.weight_bytes for rank in report.ranks] == [4 * rank.parameters for rank in report.ranks]
    assert (report.dtype, report.kv_cache_dtype) == ("float32", "float32")
    assert report.ranks[0].kv_bytes_per_token == 2 * 2 * 1 * 6 * 4
    shard_checkpoint(source, tmp_path / "cast", 2, dtype="bfloat16")
    cast = planned(tmp_path / "cast", tp_size=2)
    assert (cast.dtype, cast.ranks[0].weight_bytes) == ("bfloat16", report.ranks[0].weight_bytes // 2)


def test_a_405b_config_alone_is_enough(tmp_path: Path) -> None:
    report = planned(config_folder(tmp_path / "big", LLAMA_405B))
    assert report.parameters == 405_853_388_800  # Llama 3.1 405B
    assert report.source_bytes == 2 * report.parameters and not report.exact
    sizes = {size.tp_size: size for size in report.sizes}
    assert (sizes[8].verdict, sizes[8].kv_copies, sizes[8].concurrency) == ("even", 1.0, 0)
    assert (sizes[16].verdict, sizes[16].kv_copies) == ("even", 2.0)
    assert (sizes[3].verdict, sizes[3].imbalance > 1) == ("uneven", True)
    assert report.tp_size == 16 and len(report.ranks) == 16
    assert (report.limit, report.limit_reason) == (129, "a query head is not divided, and there are 128")


@pytest.mark.parametrize("tp_size", [8, 128])
def test_planning_cuts_one_layer_a_size_however_many_there_are(
    tmp_path: Path, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps a 405B model's answer under a second: 126 layers are not cut 12 times over."""
    from tpctl.partition import plan

    calls: list[str] = []
    cut = plan._cut

    def counting(split: TensorSplit, *rest: Any) -> Iterator[PlannedTensor]:
        calls.append(split.name)
        return cut(split, *rest)

    monkeypatch.setattr(plan, "_cut", counting)
    report = planned(config_folder(tmp_path / "big", LLAMA_405B), tp_size=tp_size)
    stored_in_a_layer = 6 + 3
    assert len(calls) == stored_in_a_layer * (len(report.sizes) + 1)  # the detailed size


def test_uneven_heads(tmp_path: Path) -> None:
    smol = make_config(num_attention_heads=9, num_key_value_heads=3, hidden_size=54)
    report = planned(config_folder(tmp_path / "smol", smol), tp_size=2)
    assert [(rank.query_heads, rank.kv_heads) for rank in report.ranks] == [(6, 2), (3, 1)]
    sizes = {size.tp_size: size for size in report.sizes}
    assert {tp for tp, size in sizes.items() if size.verdict == "even"} == {1}
    assert sizes[9].kv_copies == 3.0
    assert report.limit == 10
    narrow = make_config(intermediate_size=3)
    report = planned(config_folder(tmp_path / "narrow", narrow))
    assert report.limit == 4 and "cannot cut 3 elements into 4 parts" in report.limit_reason


def test_what_fits_follows_from_the_parts(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    for tp_size in (8, 12, 16):
        report = planned(folder, tp_size=tp_size, max_model_len=4096)
        size = next(size for size in report.sizes if size.tp_size == tp_size)
        for rank in report.ranks:
            parts = rank.weight_bytes + rank.activation_bytes + rank.kv_cache_bytes
            assert parts + report.context_bytes + report.reserve_bytes == int(report.gpu_memory * 0.9)
            assert report.reserve_bytes == reserve(126)  # the engine's
        least = min(rank.kv_cache_bytes // rank.kv_bytes_per_token for rank in report.ranks)
        assert (size.kv_tokens, size.concurrency) == (max(0, least), max(0, least) // 4096)
        enough = planned(folder, tp_size=tp_size, max_model_len=4096, gpu_memory=size.needed + 100)
        short = planned(folder, tp_size=tp_size, max_model_len=4096, gpu_memory=size.needed - (16 << 20))
        at = {r.gpu_memory: next(s for s in r.sizes if s.tp_size == tp_size) for r in (enough, short)}
        assert at[size.needed + 100].concurrency == 1
        assert at[size.needed - (16 << 20)].concurrency == 0


def test_the_kv_cache_is_the_engines(tmp_path: Path) -> None:
    import torch

    from tpctl.layers.attention.base import AttentionSpec
    from tpctl.layers.attention.sdpa import SdpaBackend

    big = config_folder(tmp_path / "big", LLAMA_405B)
    report, cast = planned(big, tp_size=3), planned(big, tp_size=3, dtype="float16")
    assert (report.kv_cache_dtype, cast.kv_cache_dtype) == ("packed", "float16")
    for rank, plain in zip(report.ranks, cast.ranks, strict=True):
        layers = [AttentionSpec(rank.query_heads, rank.kv_heads, 128, 1.0)] * 126
        (pool,) = SdpaBackend(layers, 16).layer_pools(torch.float16)
        assert plain.kv_bytes_per_token * 16 == pool.block_bytes
        unpacked = 9 * 16384  # tokens: of 8 steps, less than a step and a context of 131,072; and for part blocks
        assert rank.activation_bytes - plain.activation_bytes == unpacked * rank.kv_heads * 128 * 2 * 2
        assert rank.kv_bytes_per_token * 256 == plain.kv_bytes_per_token * 193  # 12 bits a value, and 8 a vector


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    with pytest.raises(PartitionError, match="129 does not fit 128 query heads"):
        planned(folder, tp_size=129)
    with pytest.raises(UsageError, match="--max-model-len 200000 is more than the model's 131072"):
        planned(folder, max_model_len=200_000)
    chunked = {"chunk_size": 4096, "local_size": 64, "original_max_position_embeddings": 2048}
    long = config_folder(
        tmp_path / "chunked", {**LLAMA_405B, "rope_scaling": None, "dual_chunk_attention_config": chunked}
    )
    assert planned(long).max_model_len == 2048
    with pytest.raises(
        UsageError, match="more than the model's 2048; use at most that: from there up to 131072 it takes"
    ):
        planned(long, max_model_len=4096)
    with pytest.raises(UsageError, match="int3"):
        planned(folder, dtype="int3")
    other = make_checkpoint(tmp_path / "other", make_config())
    (other / "config.json").write_text(json.dumps(make_config(vocab_size=71)))
    with pytest.raises(CheckpointError, match="70 x 24 in the checkpoint but 71 x 24 by"):
        planned(other)


def test_more_memory_never_holds_less(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    metadata = read_metadata(str(folder))
    budget, last = Budget(), -1
    for gib in (40, 80, 141, 192):
        report = plan_model(metadata, replace(budget, gpu_memory=gib << 30), tp_size=16)
        tokens = next(size.kv_tokens for size in report.sizes if size.tp_size == 16)
        assert tokens >= last
        last = tokens
    assert last > 0


UNEVEN: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54}
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "uneven heads": ("llama", UNEVEN),
    "FP8": ("llama", {"quantization_config": fp8(16, 8).config}),
    "experts": ("qwen3_moe", {}),
    "experts in FP8": ("qwen3_moe", {"quantization_config": fp8(16, 8).config}),
    "windows": ("gemma3_text", {"sliding_window": 300, "num_hidden_layers": 7}),
    "windows and experts": ("gpt_oss", {"num_hidden_layers": 4}),
    "states": ("qwen3_5_moe_text", {"num_hidden_layers": 4}),
}
REFERENCE = ("uneven heads", "windows", "states")


@pytest.mark.parametrize(("name", "backend"), [*((name, "auto") for name in TAKEN), *((n, "sdpa") for n in REFERENCE)])
def test_a_running_engine_allocates_what_was_planned(name: str, backend: str, tmp_path: Path) -> None:
    """Two ranks' weights, states and, of 50 sequences, keys and values, each within 2%; by the reference's attention
    also what the cache may take of a GPU."""
    import torch

    from tests.ranks import run_ranks
    from tpctl.distributed import TPGroup
    from tpctl.engine.engine import make_runner
    from tpctl.engine.runners.memory_plan import plain_budget
    from tpctl.layers.delta_net.state import LayerState
    from tpctl.wire.settings import EngineConfig

    family, changes = TAKEN[name]
    length, seqs, memory = 1280, 50, 1 << 24
    source = make_checkpoint(tmp_path / "source", make_config(family, max_position_embeddings=2048, **changes))
    shard_checkpoint(source, tmp_path / "shards", 2)
    report = planned(source, tp_size=2, max_model_len=length, max_num_seqs=seqs, attention_backend=backend)
    assert report.attention_backend == ("triton" if backend == "auto" else backend)
    settings = {"kv_cache_memory": memory, "max_model_len": length, "max_num_seqs": seqs}
    settings |= {"block_size": 128} if backend == "auto" else {}

    def rank(group: TPGroup) -> None:
        runner, fit = make_runner(EngineConfig(tmp_path / "shards", 2, **settings), group), report.ranks[group.rank]
        assert runner.loaded.weight_bytes == pytest.approx(fit.weight_bytes, rel=0.02)
        if backend == "sdpa":
            others = runner.loaded.weight_bytes + report.context_bytes
            share = SimpleNamespace(nbytes=int(report.gpu_memory * report.utilization), taken=lambda device: others)
            free = replace(runner.loaded.settings, kv_cache_memory=None)
            budget = plain_budget(replace(runner.loaded, settings=free, share=share))
            assert budget == pytest.approx(fit.kv_cache_bytes + fit.state_bytes, rel=1e-4)
        held: dict[bool, dict[int, int]] = {False: {}, True: {}}
        for layer in runner.kv:
            for tensor in vars(layer).values():
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    held[isinstance(layer, LayerState)][storage.data_ptr()] = storage.nbytes()
        states, blocks = sum(held[True].values()), sum(held[False].values())
        assert fit.states == (2 * seqs if name == "states" else 0)
        assert states == pytest.approx(fit.state_bytes, rel=0.02)
        layout, whole = runner.loaded.layout, runner.memory.num_blocks
        taken = blocks * layout.slabs(length, seqs) / whole
        assert taken == pytest.approx(seqs * (length * fit.kv_bytes_per_token + fit.window_bytes), rel=0.02)

    run_ranks(2, torch.inference_mode()(rank))
    assert (report.windowed > 0) == ("windows" in name)


def test_backends_keep_what_they_keep(tmp_path: Path) -> None:
    """flash-attn gives no blocks away that windows have passed, and packs none; sdpa captures nothing, and halves."""
    folder = config_folder(tmp_path / "m", make_config("gemma3_text", sliding_window=300, max_position_embeddings=2048))
    triton, flash, sdpa = (planned(folder, attention_backend=name) for name in ("auto", "flash-attn", "sdpa"))
    assert (triton.attention_backend, flash.attention_backend) == ("triton", "flash-attn")
    assert triton.windowed > 0 == flash.windowed and sdpa.windowed == triton.windowed
    assert flash.ranks[0].window_bytes == 0 < triton.ranks[0].window_bytes
    assert flash.ranks[0].kv_bytes_per_token > triton.ranks[0].kv_bytes_per_token
    (rank,) = sdpa.ranks
    assert abs(rank.kv_cache_bytes - rank.activation_bytes) <= 1
    with pytest.raises(UsageError, match="--kv-cache-dtype packed needs --attention-backend triton, not sdpa"):
        planned(folder, attention_backend="sdpa", kv_cache_dtype="packed")
    with pytest.raises(UsageError, match="flash-attn knows no attention sinks"):
        planned(config_folder(tmp_path / "o", make_config("gpt_oss")), attention_backend="flash-attn")
