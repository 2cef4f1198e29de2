"""The fused forward pass computes what the readable decoder does, with every way of running a linear."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tpctl.models.cuda_decoder import CudaDecoder

from tests.gpu.here import DEVICE
from tests.tiny import make_checkpoint
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.distributed import TPGroup
from tpctl.engine.runners.cuda import CudaLaunched, CudaRunner
from tpctl.engine.runners.runner import RotaryTable, head_shape
from tpctl.errors import EngineError
from tpctl.kernels.linear import gated_linear
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.batch import ForwardBatch, PrefillChunks
from tpctl.manifest.manifest import Manifest
from tpctl.models import cuda_decoder
from tpctl.models.decoder import Decoder
from tpctl.models.loader import load_shard
from tpctl.sharding.cutting.shard import shard_checkpoint

pytestmark = pytest.mark.gpu
MANY, FEW = [1, 1, 19, 1, 13], [1, 1, 4, 1, 3]  # new tokens of each sequence, two of them decodes
LENGTHS = [21, 3, 19, 17, 13]  # tokens of all
DECODES = 2
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 2}


class FirstOfTwo(TPGroup):
    """Rank 0 of two whose other one holds the same."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2, "runs of a linear are not for NCCL"
        return x.mul_(2)


@pytest.mark.parametrize(
    "name,intermediate,tp_size,new,used",
    [
        ("qwen3", 256, 1, MANY, {"split_linear", "gated_linear"}),
        ("llama3", 320, 1, MANY, {"split_linear"}),  # a stride of 80 fills too little of a tile of 128
        ("llama-biases", 256, 1, MANY, set()),
        ("qwen3", 512, 2, MANY, {"split_linear", "gated_linear"}),
        ("llama-biases", 512, 2, MANY, set()),
        ("qwen3", 256, 1, FEW, set()),
        ("llama-biases", 256, 1, FEW, set()),
        ("qwen3", 512, 2, FEW, set()),
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
    make_checkpoint(name, tmp_path / "hf", **SHAPE, intermediate_size=intermediate)
    shard_checkpoint(tmp_path / "hf", tmp_path / "shards", tp_size)
    manifest, config = Manifest.load(tmp_path / "shards"), ModelConfig.load(tmp_path / "shards")
    plan, group = build_plan(config, tp_size), (TPGroup if tp_size == 1 else FirstOfTwo)(0, tp_size, DEVICE)
    backend = TritonBackend(head_shape(config, plan, 0), 16)
    rotary = RotaryTable(config.rope, 128, DEVICE)
    with torch.device("meta"):
        model = Decoder(config, plan, backend, rotary, group, torch.float32)
    constants = {name for name, tensor in manifest.tensors(0).items() if tensor.fill}
    load_shard(model, [tmp_path / "shards" / name for name in manifest.rank_files(0)], DEVICE, constants)
    model.eval()
    for parameter in model.parameters():  # on a CPU views of a file; on GPUs their own memory, aligned
        parameter.data = parameter.data.clone()
    # Float32 is run by torch's linears alone; here it stands for bfloat16, which the interpreter gets wrong.
    monkeypatch.setattr(CudaDecoder, "_takes", staticmethod(lambda x: True))
    monkeypatch.setattr(cuda_decoder, "is_hopper", lambda device: True)
    monkeypatch.setattr(cuda_decoder, "num_multiprocessors", lambda device: 4)
    monkeypatch.setattr(gated_linear, "_BUFFER_BYTES", 100 << 10)  # of values half as large
    monkeypatch.setattr(cuda_decoder.PeerBuffer, "connect", lambda *args: None)
    monkeypatch.setattr(cuda_decoder, "reach_each_other", lambda group: True)
    monkeypatch.setattr(cuda_decoder, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=object())))
    seen = set()
    for kernel in ("split_linear", "gated_linear", "small_linear"):
        original = getattr(cuda_decoder, kernel)

        def spy(*args: Any, kernel: str = kernel, original: Any = original, **more: Any) -> Any:
            seen.add(kernel)
            return original(*args, **more)

        monkeypatch.setattr(cuda_decoder, kernel, spy)

    tables = torch.tensor([[1, 2], [3, 0], [4, 5], [6, 7], [8, 0]], dtype=torch.int32)
    positions = torch.cat([torch.arange(length - new, length) for new, length in zip(new, LENGTHS, strict=True)])
    sequence = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    slots = tables[sequence, positions // 16].long() * 16 + positions % 16
    ends = torch.tensor(new).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (sum(new),), generator=generator)
    shape = (9, 16, backend.heads.num_kv_heads, backend.heads.head_dim)
    past = torch.randn(shape, generator=generator).to(DEVICE)

    def run(decoder: CudaDecoder | None, captured: bool = False) -> list[torch.Tensor]:
        kv = backend.allocate(config.num_layers, 9, torch.float32, DEVICE)
        for layer in kv:
            layer.k.copy_(past)
            layer.v.copy_(past)
        batch = ForwardBatch(
            ids.to(DEVICE),
            positions.to(DEVICE),
            slots.to(DEVICE),
            tables.to(DEVICE),
            new,
            LENGTHS,
            DECODES,
            (ends - 1).to(DEVICE),
            torch.cat([torch.zeros(1), ends]).int().to(DEVICE),
            torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE),
        )
        if captured:
            # Every token a row, without work for the decode kernel where it belongs to a chunk; one chunk is empty.
            starts = [0, *ends.tolist()]
            padding = torch.zeros(3, dtype=torch.int64)
            batch = dataclasses.replace(
                batch,
                input_ids=torch.cat([ids, padding]).to(DEVICE),
                rope_positions=torch.cat([positions, padding]).to(DEVICE),
                slot_mapping=torch.cat([slots, padding - 1]).to(DEVICE),
                block_tables=tables[torch.cat([sequence, padding])].to(DEVICE),
                query_lens=[],
                seq_lens=[],
                num_decodes=sum(new) + 3,
                query_start_S1=None,
                seq_lens_S=torch.cat([(positions + 1) * (sequence < DECODES), padding]).int().to(DEVICE),
                chunks=PrefillChunks(
                    torch.cat([tables[DECODES:], tables[:1]]).to(DEVICE),
                    torch.tensor([*starts[DECODES:], starts[-1]], dtype=torch.int32, device=DEVICE),
                    torch.tensor([*LENGTHS[DECODES:], 0], dtype=torch.int32, device=DEVICE),
                ),
            )
        with torch.inference_mode():
            if decoder is None:
                backend.begin(batch, set(config.windows))
                logits = model.logits(model(batch, kv, batch.logits_rows))
            else:
                logits = decoder.logits(batch, kv, batch.logits_rows)
        return [logits, *(cache for layer in kv for cache in (layer.k, layer.v))]

    decoder = CudaDecoder(model, backend, 8, 64)
    plain, fused = run(None), run(decoder)
    assert seen == used | {"small_linear"}  # the lm_head, for a few rows of many
    assert plain[0].std() > 0.1
    for same in (fused, run(decoder, captured=True)):
        for got, want in zip(same, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_wait_that_ran_out_ends_the_engine() -> None:
    """The kernel that picks tokens over the ranks answers -1 from then on, on every rank."""
    runner = CudaRunner.__new__(CudaRunner)
    batch: Any = SimpleNamespace(sampled=[None, None])
    ready: Any = SimpleNamespace(synchronize=lambda: None)
    late = CudaLaunched(batch, [], host=torch.tensor([-1, -1, 0]), ready=ready)
    with pytest.raises(EngineError, match="a rank waited two minutes for another one"):
        runner.collect(late)
    good = CudaLaunched(batch, [], host=torch.tensor([5, 7, 0]), ready=ready)
    assert runner.collect(good) == ([5, 7], None)


@pytest.mark.parametrize(
    "rows,dtype,apart", [(3, torch.float16, True), (1, torch.float16, False), (3, torch.bfloat16, False)]
)
def test_float16_rows_are_normed_before_a_kernel_multiplies_them(rows: int, dtype: torch.dtype, apart: bool) -> None:
    """30,000 times a norm's weight of 3 is no float16."""
    decoder: Any = CudaDecoder.__new__(CudaDecoder)
    decoder._pdl = False
    norm: Any = SimpleNamespace(weight=torch.full((64,), 3.0, dtype=dtype, device=DEVICE), eps=1e-6)
    x = torch.full((rows, 64), 30000.0, dtype=dtype, device=DEVICE)
    normed, left = decoder._norm_apart(x, norm)
    if apart:
        assert left is None
        assert torch.allclose(normed, torch.full_like(x, 3.0))
    else:
        assert (normed is x, left is norm) == (True, True)
