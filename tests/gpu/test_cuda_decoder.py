"""The fused forward pass computes what the readable decoder does, with every way of running a linear."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.tiny import make_checkpoint
from tpctl.distributed import TPGroup
from tpctl.engine.cuda_runner import CudaLaunched, CudaRunner
from tpctl.engine.model_runner import RotaryTable, head_shape
from tpctl.errors import EngineError
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.batch import ForwardBatch
from tpctl.models import cuda_decoder
from tpctl.models.config import ModelConfig
from tpctl.models.cuda_decoder import CudaDecoder
from tpctl.models.decoder import Decoder
from tpctl.models.loader import load_shard
from tpctl.models.weights import build_plan
from tpctl.partition.manifest import Manifest
from tpctl.sharding.shard import shard_checkpoint

pytestmark = pytest.mark.gpu
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
LENGTHS = [19, 1, 13]
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "name,intermediate,used",
    [
        ("qwen3", 256, {"split_linear", "gated_linear"}),
        ("llama3", 320, {"split_linear"}),  # a stride of 80 fills too little of a tile of 128
        ("llama-biases", 256, set()),
    ],
)
def test_same_logits_and_cache(
    name: str, intermediate: int, used: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(name, tmp_path / "hf", **SHAPE, intermediate_size=intermediate)
    shard_checkpoint(tmp_path / "hf", tmp_path / "shards", 1)
    manifest, config = Manifest.load(tmp_path / "shards"), ModelConfig.load(tmp_path / "shards")
    plan = build_plan(config, 1)
    backend = TritonBackend(head_shape(config, plan, 0), 16)
    rotary = RotaryTable(config.rope, 128, DEVICE)
    with torch.device("meta"):
        model = Decoder(config, plan, backend, rotary, TPGroup(0, 1, DEVICE), torch.float32)
    constants = {name for name, tensor in manifest.tensors(0).items() if tensor.fill}
    load_shard(model, [tmp_path / "shards" / name for name in manifest.rank_files(0)], DEVICE, constants)
    model.eval()
    # Float32 is run by torch's linears alone; here it stands for bfloat16, which the interpreter gets wrong.
    monkeypatch.setattr(CudaDecoder, "_takes", staticmethod(lambda x: True))
    monkeypatch.setattr(cuda_decoder, "takes", lambda device: True)
    monkeypatch.setattr(cuda_decoder, "num_multiprocessors", lambda device: 4)
    if INTERPRET:  # which knows no programmatic launch
        monkeypatch.setattr(cuda_decoder, "PDL_ROWS", 0)
    seen = set()
    for kernel in ("split_linear", "gated_linear"):
        original = getattr(cuda_decoder, kernel)

        def spy(*args: Any, kernel: str = kernel, original: Any = original, **more: Any) -> Any:
            seen.add(kernel)
            return original(*args, **more)

        monkeypatch.setattr(cuda_decoder, kernel, spy)

    tables = torch.tensor([[1, 2], [3, 0], [4, 0]], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    slots = tables[sequence, positions // 16].long() * 16 + positions % 16
    ends = torch.tensor(LENGTHS).cumsum(0)
    ids = torch.randint(3, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))

    def run(decoder: CudaDecoder | None) -> list[torch.Tensor]:
        kv = backend.allocate(config.num_layers, 6, torch.float32, DEVICE)
        batch = ForwardBatch(
            ids.to(DEVICE),
            positions.to(DEVICE),
            slots.to(DEVICE),
            tables.to(DEVICE),
            LENGTHS,
            LENGTHS,
            0,
            (ends - 1).to(DEVICE),
            torch.cat([torch.zeros(1), ends]).int().to(DEVICE),
            torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE),
        )
        with torch.inference_mode():
            if decoder is None:
                logits = model.logits(model(batch, kv, batch.logits_rows))
            else:
                logits = decoder.logits(batch, kv, batch.logits_rows)
        return [logits, *(cache for layer in kv for cache in (layer.k, layer.v))]

    plain, fused = run(None), run(CudaDecoder(model, backend, 8))
    assert seen == used
    assert plain[0].std() > 0.1
    for got, want in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_wait_that_ran_out_ends_the_engine() -> None:
    """The kernel that picks tokens over the ranks answers -1 from then on; the host asks what that means."""
    decoder = CudaDecoder.__new__(CudaDecoder)
    decoder.group = TPGroup(1, 2, "cpu")
    runner = CudaRunner.__new__(CudaRunner)
    runner._decoder = decoder
    batch: Any = SimpleNamespace(sampled=[None, None])
    ready: Any = SimpleNamespace(synchronize=lambda: None)
    late = CudaLaunched(batch, [], host=torch.tensor([-1, -1, 0]), ready=ready)
    decoder.peers = SimpleNamespace(timed_out=lambda: True)  # type: ignore[assignment]
    with pytest.raises(EngineError, match="rank 1 waited two minutes for another rank"):
        runner.collect(late)
    good = CudaLaunched(batch, [], host=torch.tensor([5, 7, 0]), ready=ready)
    assert runner.collect(good) == ([5, 7], None)
