"""DeepSeek-V3 with fused kernels computes what it does in plain torch, in every way of computing attention, and the GPU
engine's answers are transformers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, INTERPRET
from tests.gpu.stand_in import answered, best, prompts_of, replayed, start
from tests.gpu.test_compute_cuda import (
    BLOCK,
    BLOCKS,
    FEW,
    HOPPER,
    LENGTHS,
    MANY,
    FirstOfTwo,
    Plain,
    as_captured,
    build,
    make_batch,
)
from tests.tiny import YARN_ROPE, make_mixture
from tpctl.distributed import TPGroup
from tpctl.engine.runners import outline
from tpctl.layers.attention.base import AttentionBackend, LayerKV
from tpctl.layers.attention.sdpa_latent import LatentKV, SdpaLatentBackend
from tpctl.layers.attention.triton_latent import TritonLatentBackend
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.models.decoder import Decoder
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams

pytestmark = pytest.mark.gpu
__all__ = ["replayed"]  # a fixture
ROPE: dict[str, Any] = {"rope_parameters": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.0}}
FORMS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_attention_heads": 6, "rope_interleave": False, **ROPE},
    "deepseek_v3-no-q-rank": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "v_head_dim": 12,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
    },
}
"""With a rank for queries, as V3 and R1, and without, as V2-Lite and Moonlight; one has values smaller than keys."""


def made(name: str, folder: Path, tp_size: int, **changes: Any) -> Any:
    model = make_mixture(name, folder / "hf", **{"num_hidden_layers": 2, **FORMS[name], **changes})
    shard_checkpoint(folder / "hf", folder / "shards", tp_size)
    return model


def stored(kv: LayerKV) -> Tensor:
    """[blocks * B, R + Q], whatever the backend's layout is."""
    rows = kv.blocks[:BLOCKS] if isinstance(kv, LatentKV) else kv.k
    return rows.reshape(BLOCKS * BLOCK, -1)


def cached(model: Decoder, backend: AttentionBackend[Any], steps: list[ForwardBatch]) -> list[Tensor]:
    """The last step's logits, then what each layer keeps, [blocks, B, R + Q]."""
    kv = backend.allocate(BLOCKS, torch.float32, DEVICE)
    with torch.inference_mode():
        for step in steps:
            logits = model(step, kv, step.logits_rows)
    return [logits, *map(stored, kv)]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("tp_size,new", [(1, MANY), (1, FEW), (2, MANY)])
@pytest.mark.parametrize("name", FORMS)
def test_same_logits_and_cache(
    name: str, tp_size: int, new: list[int], plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes beside prompts with and without a prefix, these absorbed or with keys and values made of the cache."""
    made(name, tmp_path, tp_size)
    group = (TPGroup if tp_size == 1 else FirstOfTwo)(0, tp_size, DEVICE)
    old = [max(1, length - count) for count, length in zip(new, LENGTHS, strict=True)]  # what is new is written anew
    ids = torch.randint(3, 100, (sum(old + new),), generator=torch.Generator().manual_seed(0))
    before = dataclasses.replace(make_batch(ids[: sum(old)], old, old), num_decodes=0)
    steps = [before, make_batch(ids[sum(old) :], new, LENGTHS)]
    want = cached(*build(tmp_path / "shards", SdpaLatentBackend, group, Plain(group)), steps)
    assert want[0].std() > 0.01
    model, backend = build(tmp_path / "shards", TritonLatentBackend, group, CudaCompute(group, facts=HOPPER))
    assert isinstance(backend, TritonLatentBackend)
    backend._dtype = torch.float32
    if plain:
        backend.reserve(64, 64, DEVICE)
        monkeypatch.setattr("tpctl.layers.attention.latent_weights.LatentUp.absorbs", lambda *_: False)
    for last in (steps[1], as_captured(steps[1], new)):
        for got, expected in zip(cached(model, backend, [steps[0], last]), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRET, reason="stands for a GPU")
@pytest.mark.parametrize("way", ["graphs", "eager", "paced", "tight"])
def test_tokens_equal_transformers(
    way: str, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In captured steps and without, beside prompts, with a prefix that is found, and preempted."""
    name = "deepseek_v3" if way in ("graphs", "paced") else "deepseek_v3-no-q-rank"
    model = made(name, tmp_path, 1, first_k_dense_replace=1 if way == "graphs" else 2)

    def backend(*args: Any, **more: Any) -> TritonLatentBackend:
        return TritonLatentBackend(args[3], args[4], dtype=args[2])

    monkeypatch.setattr(outline, "make_backend", backend)
    prompts = prompts_of(3, 17, 36, 9)
    prompts["3"] = prompts["2"][:32] + prompts["3"]  # a shared prefix
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
    }
    if way == "tight":  # each fits into a block, their answers not
        prompts = prompts_of(14, 15, 15)
        settings["tight"] = {"kv_cache_memory": 6 * 2 * (32 + 4) * 16 * 4}
    engine = start(tmp_path / "shards", **settings[way])
    lengths = dict.fromkeys(prompts, 20 if way == "tight" else 4)
    if way == "paced":
        lengths["0"] = 12  # worth waiting for
    params = {id: SamplingParams(max_tokens=lengths[id], ignore_eos=True) for id in prompts}
    requests = [Request(id, ids, params[id]) for id, ids in prompts.items()]
    found = answered(engine, requests[:3], requests[3:])
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
        assert len(found[id]) == lengths[id]
    stats = engine.stats()
    assert (len(replayed) > 0) == (way != "eager")
    assert any(key[0] == "mixed" for key in replayed) == (way == "paced")  # type: ignore[index]
    assert (engine.scheduler.stats.preemptions > 0) == (way == "tight")
    assert stats.prefix_cache_hit_tokens == (0 if way == "tight" else 32)


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "vocab_size": 517,
    "max_position_embeddings": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""The sizes of heads that are published."""


@pytest.mark.skipif(INTERPRET, reason="a GPU's engine")
@pytest.mark.parametrize("q_rank", [192, None])
def test_a_gpus_tokens_at_published_sizes(q_rank: int | None, tmp_path: Path) -> None:
    """In float32 those of transformers; in bfloat16 near them, and the same from graphs and kernel by kernel."""
    from tests.gpu import test_engine

    shape = {**WIDE, "q_lora_rank": q_rank, "n_routed_experts": 12}
    model = made("deepseek_v3", tmp_path, 1, **shape).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "bf16", 1, dtype="bfloat16")
    prompts = test_engine.prompts_of(517, (3, 17, 40, 65, 130, 300))
    more = {"max_num_batched_tokens": 256, "kv_cache_memory": 64 << 20}
    for ids, tokens in zip(prompts, test_engine.run(tmp_path / "shards", prompts, **more), strict=True):
        assert tokens == best(model, ids, tokens)
    ways: list[dict[str, Any]] = [{}, {"enforce_eager": True}, {"scheduling_policy": "makespan"}]
    found = [test_engine.run(tmp_path / "bf16", prompts, **more, **way) for way in ways]
    assert found[0] == found[1]
    assert all(test_engine.most_behind(model, prompts, one) < 0.25 for one in found)
