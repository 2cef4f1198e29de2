"""The forward pass with fused kernels computes what it does in plain torch, with every way of running a linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, INTERPRET
from tests.tiny import FAMILIES, LONG_ROPES, make_checkpoint
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.distributed import TPGroup
from tpctl.engine.runners.cuda import CudaLaunched, CudaRunner
from tpctl.errors import EngineError
from tpctl.kernels.common.norm import rms_norm_reference
from tpctl.kernels.linear import gated_linear
from tpctl.layers import compute_cuda
from tpctl.layers.attention.base import AttentionBackend, AttentionSpec, LayerKV
from tpctl.layers.attention.heads import HeadPreparation
from tpctl.layers.attention.latent import spec_of
from tpctl.layers.attention.sdpa import SdpaBackend
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.batch import ForwardBatch, PoolTables, PrefillChunks
from tpctl.layers.compute import Compute
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import rotary_tables
from tpctl.layers.weights import kernels
from tpctl.layers.weights.dense import DenseWeight, Weight
from tpctl.layers.weights.kernels import GpuFacts, KernelWeight
from tpctl.manifest.manifest import Manifest
from tpctl.models.decoder import Decoder
from tpctl.models.loader import load_shard
from tpctl.sharding.cutting.shard import shard_checkpoint

pytestmark = pytest.mark.gpu
MANY, FEW = [1, 1, 17, 1, 3], [1, 1, 4, 1, 3]  # new tokens of each sequence, two of them decodes
LENGTHS = [21, 3, 17, 17, 13]  # tokens of all
DECODES, BLOCK, BLOCKS = 2, 16, 9
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 2}
ROPES: dict[str, Any] = {"phi4-mini": {"rope_parameters": LONG_ROPES[12] | {"partial_rotary_factor": 0.75}}}
TABLES = torch.tensor([[1, 2], [3, 0], [4, 5], [6, 7], [8, 0]], dtype=torch.int32)
# Float32 is left to cuBLAS; here it stands for bfloat16, which the interpreter gets wrong.
HOPPER = GpuFacts(hopper=True, multiprocessors=4, few_rows=16, wide=True)


def few_layers(name: str) -> dict[str, int]:
    """Two, so that one follows another, where all are alike and an interpreter takes seconds for each."""
    differ = {"num_hidden_layers", "layer_types", "max_window_layers", "no_rope_layer_interval", "no_rope_layers"}
    return {"num_hidden_layers": 2} if INTERPRET and not differ & FAMILIES[name][1].keys() else {}


class FirstOfTwo(TPGroup):
    """Rank 0 of two whose other one holds the same."""

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.dim() == 2, "runs of a linear are not for NCCL"
        return x.mul_(2)


class Plain(Compute):
    """Weights in plain torch, also on a CPU."""

    def weight(self, weight: Tensor, *, gated: bool = False) -> Weight:
        return DenseWeight(weight)


def build(
    folder: Path, kind: Callable[..., AttentionBackend[Any]], group: TPGroup, compute: Compute
) -> tuple[Decoder, AttentionBackend[Any]]:
    manifest, config = Manifest.load(folder), ModelConfig.load(folder)
    made_of = config.blueprint
    backend = kind([spec_of(attention, 0, group.size) for attention in made_of.attentions], BLOCK)
    rotaries = rotary_tables([block.attention.rope for block in made_of.blocks], 128, DEVICE)
    with torch.device("meta"):
        model = Decoder(made_of, build_plan(config, group.size), backend, rotaries, group, torch.float32)
    constants = {name for name, tensor in manifest.tensors(0).items() if tensor.fill}
    load_shard(model, [folder / name for name in manifest.rank_files(0)], DEVICE, constants)
    for parameter in model.parameters():  # on a CPU views of a file; on GPUs their own memory, aligned
        parameter.data = parameter.data.clone()
    model.eval()
    model.use(compute)
    return model, backend


def make_batch(ids: Tensor, new: list[int], lengths: list[int]) -> ForwardBatch:
    """The last ``new`` tokens of sequences of ``lengths`` tokens."""
    positions = torch.cat([torch.arange(length - count, length) for count, length in zip(new, lengths, strict=True)])
    sequence = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    ends = torch.tensor(new).cumsum(0)
    slots = TABLES[sequence, positions // BLOCK].long() * BLOCK + positions % BLOCK
    return ForwardBatch(
        input_ids=ids.to(DEVICE),
        rope_positions=positions.to(DEVICE),
        pools=(PoolTables(slots.to(DEVICE), TABLES.to(DEVICE)),),
        query_lens=new,
        seq_lens=lengths,
        num_decodes=DECODES,
        logits_rows=(ends - 1).to(DEVICE),
        query_start_S1=torch.cat([torch.zeros(1), ends]).int().to(DEVICE),
        seq_lens_S=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )


def as_captured(batch: ForwardBatch, new: list[int]) -> ForwardBatch:
    """Every token a row, without work for the decode kernel where it belongs to a chunk; one chunk is empty."""
    ends = torch.tensor(new).cumsum(0)
    starts, padding = [0, *ends.tolist()], torch.zeros(3, dtype=torch.int64, device=DEVICE)
    sequence = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new)).to(DEVICE)
    seen = (batch.rope_positions + 1) * (sequence < DECODES)
    ((slots, tables),) = batch.pools
    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, padding]),
        rope_positions=torch.cat([batch.rope_positions, padding]),
        pools=(PoolTables(torch.cat([slots, padding - 1]), tables[torch.cat([sequence, padding])]),),
        query_lens=[],
        seq_lens=[],
        num_decodes=sum(new) + 3,
        query_start_S1=None,
        seq_lens_S=torch.cat([seen, padding]).int(),
        chunks=PrefillChunks(
            (torch.cat([tables[DECODES:], tables[:1]]),),
            torch.tensor([*starts[DECODES:], starts[-1]], dtype=torch.int32, device=DEVICE),
            torch.tensor([*LENGTHS[DECODES:], 0], dtype=torch.int32, device=DEVICE),
        ),
    )


def stored(kv: LayerKV) -> list[Tensor]:
    """Keys and values, [blocks, B, K, D] whatever the backend's layout is."""
    if kv.k.shape[0] == BLOCKS:
        return [kv.k, kv.v]
    return [side.permute(1, 2, 0, 3)[:BLOCKS] for side in (kv.k, kv.v)]


Run = Callable[[Decoder, AttentionBackend[Any], ForwardBatch], list[Tensor]]


def a_step(new: list[int], tp_size: int) -> tuple[Run, ForwardBatch]:
    """A step of random tokens, and what computes it over random keys and values: logits, then what is cached."""
    generator = torch.Generator().manual_seed(0)
    old = [length - count for count, length in zip(new, LENGTHS, strict=True)]
    before = make_batch(torch.zeros(sum(old), dtype=torch.int64), old, old)
    step = make_batch(torch.randint(3, 100, (sum(new),), generator=generator), new, LENGTHS)
    past = [torch.randn(2, sum(old), 8 // tp_size, 32, generator=generator).to(DEVICE) for _ in range(4)]

    def caches(model: Decoder, kv: list[LayerKV]) -> list[LayerKV]:
        """Of every layer; those that read an earlier one's have that."""
        own, found = iter(kv), []
        for block in model.made_of.blocks:
            found.append(next(own) if block.attention.reads is None else found[block.attention.reads])
        return found

    def run(model: Decoder, backend: AttentionBackend[Any], batch: ForwardBatch) -> list[Tensor]:
        kv = backend.allocate(BLOCKS, torch.float32, DEVICE)
        with torch.inference_mode():
            for layer, values in zip(kv, past, strict=False):
                own = values[:, :, : layer.spec.num_kv_heads, : layer.spec.head_dim]
                backend.store(*own, layer, backend.begin(before))
            logits = model(batch, caches(model, kv), batch.logits_rows)
        return [logits, *(side for layer in kv for side in stored(layer))]

    return run, step


def always(*values: Any) -> Any:
    """A case that takes a path of its own: of kernels, of attention, or of sums over ranks."""
    return pytest.param(*values, marks=pytest.mark.always)


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    "name,intermediate,tp_size,new,used",
    [
        always("qwen3", 256, 1, MANY, {"split_linear", "gated_linear"}),
        always("llama3", 320, 1, MANY, {"split_linear"}),  # a stride of 80 fills too little of a tile of 128
        ("llama-biases", 256, 1, MANY, set()),
        always("qwen3", 512, 2, MANY, {"split_linear", "gated_linear"}),
        ("llama-biases", 512, 2, MANY, set()),
        ("qwen3", 256, 1, FEW, set()),
        ("llama-biases", 256, 1, FEW, set()),
        ("qwen3", 512, 2, FEW, set()),
        always("mistral", 256, 1, MANY, {"split_linear", "gated_linear"}),  # a window of 7 tokens
        ("qwen2-window", 256, 1, FEW, set()),  # in some layers
        always("phi4-mini", 256, 1, MANY, {"split_linear", "gated_linear"}),  # fused in the source, rotated in part
        ("phi4-mini", 256, 1, FEW, set()),
        always("gemma3", 256, 1, MANY, {"split_linear", "gated_linear"}),  # sandwich norms, another RoPE in some layers
        always("gemma2", 256, 1, FEW, set()),  # capped scores
        ("gemma3-caps", 256, 1, FEW, set()),
        ("gemma3-caps", 512, 2, MANY, {"gated_linear"}),
        ("olmo2", 256, 1, MANY, {"split_linear", "gated_linear"}),  # norms behind, and over all heads at once
        ("olmo2", 256, 1, FEW, set()),
        always("olmo2", 512, 2, MANY, {"split_linear", "gated_linear"}),
        ("olmo3-yarn", 512, 2, FEW, set()),
        ("smollm3-window", 256, 1, MANY, {"split_linear", "gated_linear"}),  # layers without RoPE
        ("granite", 256, 1, FEW, set()),  # factors
        ("cohere2", 256, 1, FEW, set()),  # attention and MLP beside each other, behind one LayerNorm
        always("cohere2", 512, 2, MANY, {"split_linear", "gated_linear"}),
        always("glm4", 256, 1, MANY, {"gated_linear"}),  # neighbours rotated in a part of a head
        ("granite", 512, 2, MANY, {"split_linear", "gated_linear"}),
        ("ministral3-window", 256, 1, FEW, set()),  # queries that grow with their position
        ("gemma4-text", 256, 1, MANY, {"gated_linear"}),  # normed values, heads of two sizes
        ("gemma4-text-moe", 256, 1, FEW, set()),  # keys that serve as values, experts beside the MLP
        ("gemma4-text-edge", 256, 1, FEW, set()),  # layers that read another's keys, embeddings by layer
        ("gemma4-text-edge", 512, 2, MANY, {"split_linear", "gated_linear"}),
    ],
)
def test_same_logits_and_cache(
    name: str,
    intermediate: int,
    tp_size: int,
    new: list[int],
    used: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {**SHAPE, **ROPES.get(name, {}), **few_layers(name)}
    make_checkpoint(name, tmp_path / "hf", **sizes, intermediate_size=intermediate)
    shard_checkpoint(tmp_path / "hf", tmp_path / "shards", tp_size)
    group = (TPGroup if tp_size == 1 else FirstOfTwo)(0, tp_size, DEVICE)
    monkeypatch.setattr(gated_linear, "_BUFFER_BYTES", 100 << 10)  # of values half as large
    seen = set()
    for kernel in ("split_linear", "gated_linear", "small_linear"):
        original = getattr(kernels, kernel)

        def spy(*args: Any, kernel: str = kernel, original: Any = original, **more: Any) -> Any:
            seen.add(kernel)
            return original(*args, **more)

        monkeypatch.setattr(kernels, kernel, spy)

    run, step = a_step(new, tp_size)
    plain = run(*build(tmp_path / "shards", SdpaBackend, group, Plain(group)), step)
    assert not seen and plain[0].std() > 0.1
    fused = build(tmp_path / "shards", TritonBackend, group, CudaCompute(group, facts=HOPPER))
    found = run(*fused, step)
    assert seen == used | {"small_linear"}  # the lm_head, for a few rows of many
    for same in (found, run(*fused, as_captured(step, new))):
        for got, want in zip(same, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.always
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("new", [MANY, FEW])
def test_sinks_join_every_softmax(new: list[int], window: int | None) -> None:
    """Of decodes and of prompts, also in a captured step; in heads that are not rotated."""
    generator = torch.Generator().manual_seed(1)
    old = [length - count for count, length in zip(new, LENGTHS, strict=True)]
    before = make_batch(torch.zeros(sum(old), dtype=torch.int64), old, old)
    step = make_batch(torch.zeros(sum(new), dtype=torch.int64), new, LENGTHS)
    past = torch.randn(2, sum(old), 2, 32, generator=generator).to(DEVICE)
    qkv = torch.randn(sum(new), 12 * 32, generator=generator).to(DEVICE)
    sinks = (2 * torch.randn(8, generator=generator)).to(DEVICE)

    def run(kind: Callable[..., AttentionBackend[Any]], batch: ForwardBatch, sinks: Tensor | None) -> Tensor:
        backend = kind([AttentionSpec(8, 2, 32, 0.3, window, sinks=sinks is not None)], BLOCK)
        (kv,) = backend.allocate(BLOCKS, torch.float32, DEVICE)
        backend.store(*past, kv, backend.begin(before))
        rows = torch.cat([qkv, qkv.new_zeros(batch.num_tokens - len(qkv), 12 * 32)])
        return backend.run(rows, HeadPreparation(None), kv, backend.begin(batch), sinks)[: len(qkv)]

    wanted = run(SdpaBackend, step, sinks)
    for batch in (step, as_captured(step, new)):
        torch.testing.assert_close(run(TritonBackend, batch, sinks), wanted, rtol=1e-4, atol=1e-5)
    assert (run(SdpaBackend, step, None).norm(dim=-1) > wanted.norm(dim=-1)).all()  # some of each weight is the sink's


def test_a_wait_that_ran_out_ends_the_engine() -> None:
    """The kernel that picks tokens over the ranks answers -1 from then on, on every rank."""
    runner = CudaRunner.__new__(CudaRunner)
    batch: Any = SimpleNamespace(num_sampled=2)
    ready: Any = SimpleNamespace(synchronize=lambda: None)
    late = CudaLaunched(batch, [], host=torch.tensor([-1, -1, 0]), ready=ready)
    with pytest.raises(EngineError, match="a rank waited two minutes for another one"):
        runner.collect(late)
    good = CudaLaunched(batch, [], host=torch.tensor([5, 7, 0]), ready=ready)
    assert runner.collect(good) == ([5, 7], None)


@pytest.mark.always
@pytest.mark.parametrize(
    "rows,dtype,apart", [(3, torch.float16, True), (1, torch.float16, False), (3, torch.bfloat16, False)]
)
def test_float16_rows_are_normed_before_a_kernel_multiplies_them(rows: int, dtype: torch.dtype, apart: bool) -> None:
    """30,000 times a norm's weight of 3 is no float16."""
    weight = torch.zeros(8, 64, dtype=dtype, device=DEVICE)
    made = CudaCompute(TPGroup(0, 1, DEVICE), facts=HOPPER).weight(weight)
    assert isinstance(made, KernelWeight)
    norm = RMSNorm(64, 1e-6, dtype).to(DEVICE)
    norm.weight.fill_(3.0)
    x = torch.full((rows, 64), 30000.0, dtype=dtype, device=DEVICE)
    normed, left = made._norm_apart(x, norm)
    if apart:
        assert left is None
        assert torch.allclose(normed, torch.full_like(x, 3.0))
    else:
        assert (normed is x, left is norm) == (True, True)


class Peers:
    """Peer memory of ranks that all hold the same, which minds what was sent to it and what is taken for sent."""

    def __init__(self, size: int, max_rows: int) -> None:
        self.size, self.layout = size, SimpleNamespace(max_rows=max_rows)
        self.pending: list[int] = []
        self.calls: set[str] = set()

    def fits(self, x: Tensor) -> bool:
        return True

    def all_reduce(self, x: Tensor, *, out: Tensor, pdl: bool = False) -> Tensor:
        assert not self.pending
        self.calls.add("plain")
        return out.copy_(x * self.size)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool, sent: bool, pdl: bool
    ) -> Tensor:
        assert self.pending == ([x.data_ptr()] if sent else [])
        self.pending = []
        self.calls.add("sent" if sent else "runs" if x.dim() == 3 else "whole")
        residual.add_(self.size * (x.sum(0) if x.dim() == 3 else x))
        return rms_norm_reference(residual, weight, eps, unit_offset=unit_offset)


@pytest.mark.always
@pytest.mark.parametrize(
    "name,tp_size,new,calls",
    [
        ("qwen3", 2, FEW, {"plain", "sent"}),
        (
            "llama-biases",
            2,
            MANY,
            {"plain", "whole", "sent"},
        ),  # sent behind the last attention, where few rows are left
        ("gemma3-caps", 2, FEW, {"plain"}),  # sums are normed before they are added
        ("qwen3", 4, MANY, {"sent"}),  # NCCL's until few rows are left
    ],
)
def test_sums_through_peer_memory(
    name: str, tp_size: int, new: list[int], calls: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(name, tmp_path / "hf", **SHAPE | {"num_key_value_heads": tp_size}, intermediate_size=512)
    shard_checkpoint(tmp_path / "hf", tmp_path / "shards", tp_size)

    class First(FirstOfTwo):
        def all_reduce(self, x: Tensor) -> Tensor:
            return x.mul_(tp_size)

    monkeypatch.setattr(compute_cuda, "PEER_LIMIT", 16 * 256 * 4)
    peers: Any = Peers(tp_size, 16 if tp_size == 4 else 64)
    small_linear = kernels.small_linear

    def sending(*args: Any, outlet: Any = None, **more: Any) -> Tensor:
        out = small_linear(*args, **more)
        if outlet is not None:
            outlet.pending.append(out.data_ptr())
        return out

    monkeypatch.setattr(kernels, "small_linear", sending)
    group = First(0, tp_size, DEVICE)
    run, step = a_step(new, tp_size)
    plain = run(*build(tmp_path / "shards", SdpaBackend, group, Plain(group)), step)
    found = run(*build(tmp_path / "shards", TritonBackend, group, CudaCompute(group, peers, facts=HOPPER)), step)
    assert not peers.pending and peers.calls == calls
    for got, want in zip(found, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
