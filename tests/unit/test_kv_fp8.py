"""Keys and values in FP8 (``--kv-cache-dtype fp8``) on a CPU: what a vector becomes, and what engines then answer.

The oracle is transformers with a cache whose keys and values are rounded as they enter it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.tiny import make_checkpoint, make_mixture
from tests.unit.generating import PROMPTS, answers, requests, run
from tests.unit.synthetic import make_checkpoint as make_source
from tests.unit.synthetic import make_config
from tpctl.checkpoint.metadata import read_metadata
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.errors import UsageError
from tpctl.kernels.attention.fp8_vectors import dequantise, quantise, rounded_up
from tpctl.layers.attention.base import AttentionSpec
from tpctl.layers.attention.sdpa_fp8 import SdpaFp8Backend
from tpctl.layers.attention.select import make_backend
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig


def rounded(x: Tensor) -> Tensor:
    """What is left of vectors [..., D], written out: the nearest of all codes, and the least scale that is enough."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    largest = x.double().abs().amax(-1, keepdim=True)
    scale = (largest / 448).to(torch.bfloat16)
    above = (scale.view(torch.int16) + 1).view(torch.bfloat16)
    scale = torch.where(scale.double() * 448 < largest, above, scale).double()
    at = torch.where(scale > 0, x.double() / scale, 0.0)
    high = numbers[torch.searchsorted(numbers, at.contiguous()).clamp(max=len(numbers) - 1)]
    low = numbers[(torch.searchsorted(numbers, at.contiguous(), right=True) - 1).clamp(min=0)]
    return torch.where(at - low < high - at, low, high).mul(scale).to(x.dtype)


@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_vectors_are_rounded_to_the_nearest(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(300, head_dim, generator=generator)
    x *= torch.exp(4 * torch.randn(300, 1, generator=generator))
    x *= torch.exp(2 * torch.randn(300, head_dim, generator=generator))
    x[7] = 0
    codes, scale = quantise(x)
    kept = dequantise(codes, scale, torch.float32)
    torch.testing.assert_close(kept, rounded(x), rtol=1e-6, atol=0)
    assert torch.equal(kept, codes.float() * scale.float()[:, None])
    largest = x.abs().amax(-1, keepdim=True)
    bound = torch.maximum(2.0**-4 * x.abs(), 2.0**-18.7 * largest)
    assert ((kept - x).abs() <= bound).all()


def test_every_code_is_the_number_it_stands_for() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes.view(torch.float8_e4m3fn).float().isfinite()
    for scale in (1.0, 2.0**-100, 2.0**100):
        scales = torch.full((256,), scale).to(torch.bfloat16)
        want = codes.view(torch.float8_e4m3fn).float() * scale
        for dtype in (torch.float32, torch.bfloat16):
            got = dequantise(codes[:, None], scales, dtype)[:, 0]
            assert torch.equal(got[finite], want[finite].to(dtype))


def test_scales_are_rounded_up_and_tell_what_is_not_finite() -> None:
    x = torch.tensor([0.0, 1.0, 1.0 + 2.0**-20, 2.0**-149, 3.3e38, torch.inf, torch.nan])
    found = rounded_up(x)
    assert found[:5].tolist()[:3] == [0.0, 1.0, 1.0 + 2.0**-7]
    assert (found[:5] >= x[:5]).all()
    assert found[5:].isnan().all()
    for wrong in (torch.inf, -torch.inf, torch.nan):
        vector = torch.ones(2, 8)
        vector[0, 3] = wrong
        kept = dequantise(*quantise(vector), torch.float32)
        assert kept[0].isnan().all() and kept[1].isfinite().all()


class RoundedCache(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().update(rounded(key_states), rounded(value_states), *args, **more)
        return found


NAMES = ["llama3", "gemma2-caps", "gemma3", "gpt_oss", "phi3-long-rope"]


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """Shards for one and two ranks, and what they are to answer."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt_oss":
        model = make_mixture("gpt_oss", folder / "hf", sliding_window=7)
    else:
        model = make_checkpoint(request.param, folder / "hf")
    for tp_size in (1, 2):
        shard_checkpoint(folder / "hf", folder / f"tp{tp_size}", tp_size)
    if request.param == "phi3-long-rope":  # of which generate begins a new cache at the border
        tokens, _ = run(folder / "tp1", 1, [[one] for one in requests()], kv_cache_dtype="fp8")
        return folder, [tokens[str(index)] for index in range(len(PROMPTS))]
    return folder, answers(model, cache=lambda: RoundedCache(config=model.config))


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"max_num_batched_tokens": 10, "max_num_seqs": 4},
    "crowded": {"max_num_seqs": 9},
    "unshared": {"enable_prefix_caching": False},
}


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize(
    ("way", "tp_size"), [("whole", 1), ("chunks", 1), ("crowded", 1), ("unshared", 1), ("chunks", 2)]
)
def test_greedy_tokens_are_the_same_in_any_company(made: tuple[Path, list[list[int]]], way: str, tp_size: int) -> None:
    folder, expected = made
    settings = dict(WAYS[way])
    if way == "crowded":  # 28 blocks of 4 tokens, of some 120 that are wanted
        with torch.inference_mode():
            runner = make_runner(EngineConfig(folder / "tp1", 1, block_size=4, kv_cache_dtype="fp8"), TPGroup())
        settings["kv_cache_memory"] = 28 * runner.loaded.slab_bytes
    # The second time most blocks are found in the prefix cache.
    groups = [requests(), requests("again ")]
    tokens, stats = run(folder / f"tp{tp_size}", tp_size, groups, kv_cache_dtype="fp8", **settings)
    assert [tokens[str(index)] for index in range(len(PROMPTS))] == expected
    assert [tokens[f"again {index}"] for index in range(len(PROMPTS))] == expected
    assert (stats.preemptions > 0) == (way == "crowded")
    assert (stats.prefix_cache_hit_tokens > 0) == (way != "unshared")


def test_attention_between_recurrent_layers_keeps_its_keys_in_fp8(tmp_path: Path) -> None:
    make_mixture("qwen3_next", tmp_path / "hf")
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp2", 2)
    prompts = PROMPTS[2:7]
    groups = [requests("", prompts), requests("again ", prompts)]
    tokens, _ = run(tmp_path / "tp2", 2, [[one] for one in groups[0]], kv_cache_dtype="fp8")
    alone = [tokens[str(index)] for index in range(len(prompts))]
    exact, _ = run(tmp_path / "tp2", 2, groups[:1], kv_cache_dtype="model")
    assert alone != [exact[str(index)] for index in range(len(prompts))]
    tokens, stats = run(tmp_path / "tp2", 2, groups, kv_cache_dtype="fp8", max_num_batched_tokens=10, max_num_seqs=3)
    for way in ("", "again "):
        assert [tokens[f"{way}{index}"] for index in range(len(prompts))] == alone
    assert stats.prefix_cache_hit_tokens > 0


def test_the_rounding_is_seen(tmp_path: Path) -> None:
    """Else the tests above would compare nothing."""
    make_checkpoint("llama3", tmp_path / "hf")
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    fp8, _ = run(tmp_path / "tp1", 1, [requests()], kv_cache_dtype="fp8")
    auto, _ = run(tmp_path / "tp1", 1, [requests()])
    model, _ = run(tmp_path / "tp1", 1, [requests()], kv_cache_dtype="model")
    assert auto == model != fp8


def test_memory_is_what_is_counted_and_planned(tmp_path: Path) -> None:
    config = make_config(num_attention_heads=6, num_key_value_heads=2, hidden_size=48, head_dim=64)
    source = make_source(tmp_path / "source", config)
    shard_checkpoint(source, tmp_path / "tp1", 1, dtype="bfloat16")
    budget = Budget(gpu_memory=8 << 30, kv_cache_dtype="fp8")
    report = plan_model(read_metadata(str(source)), budget, tp_size=1, dtype="bfloat16")
    (rank,) = report.ranks
    layers = config["num_hidden_layers"]
    assert report.kv_cache_dtype == "fp8"
    assert rank.kv_bytes_per_token == layers * 2 * 2 * (64 + 2)
    settings = EngineConfig(tmp_path / "tp1", 1, kv_cache_memory=100_000, block_size=16, kv_cache_dtype="fp8")
    with torch.inference_mode():
        runner = make_runner(settings, TPGroup())
    info = runner.info()
    assert (info.dtype, info.kv_cache_dtype) == ("bfloat16", "fp8")
    assert info.num_blocks == 100_000 // rank.kv_bytes_per_token // 16
    assert info.kv_cache_bytes == info.num_blocks * 16 * rank.kv_bytes_per_token
    kv: Any
    for kv in runner.kv:  # and a block that stays empty
        assert (kv.blocks.nbytes + kv.scales.nbytes) * layers == (info.num_blocks + 1) * 16 * rank.kv_bytes_per_token
    with pytest.raises(UsageError, match="--kv-cache-dtype fp8 needs bfloat16 or float16 on a GPU, not float32; use"):
        plan_model(read_metadata(str(source)), budget, tp_size=1, dtype="float32")


def test_what_an_fp8_cache_needs() -> None:
    def made(backend: str, dtype: torch.dtype, head_dim: int, softcap: float | None = None) -> Any:
        heads = [AttentionSpec(4, 2, head_dim, 1.0, softcap=softcap)]
        return make_backend(backend, "cuda", dtype, heads, None, kv_cache_dtype="fp8", whole_heads=False)

    assert isinstance(made("sdpa", torch.float32, 80, 30.0), SdpaFp8Backend)
    pytest.importorskip("triton")
    assert made("triton", torch.float16, 128).kv_form == "fp8"
    for said, asked in {
        "fp8 needs --attention-backend triton or sdpa, not flash-attn": ("flash-attn", torch.bfloat16, 128),
        "fp8 needs bfloat16 or float16 on a GPU, not float32": ("triton", torch.float32, 128),
        "fp8 needs heads of 64, 128, 256 dimensions on a GPU, not 80": ("triton", torch.bfloat16, 80),
    }.items():
        with pytest.raises(UsageError, match=said):
            made(*asked)
