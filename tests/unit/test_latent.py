"""Latent attention: both of its forms are what its definition says, its cache is as large as it is said to be, and what
it does not do yet is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.tiny import make_mixture
from tests.unit.bad_input import local_answer
from tests.unit.packers import PACKERS
from tests.unit.test_models import logits_of
from tests.unit.test_quantised_runs import model_of
from tpctl.arch.config import ModelConfig
from tpctl.arch.latent import LatentSizes
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.metadata import read_metadata
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.engine.runners.loading import run_bytes
from tpctl.errors import UsageError
from tpctl.layers.attention import sdpa_latent, select
from tpctl.layers.attention.base import AttentionSpec
from tpctl.layers.attention.latent_weights import LatentUp
from tpctl.layers.attention.sdpa_latent import LatentKV
from tpctl.manifest.manifest import Manifest
from tpctl.planning.fit import Budget, plan_model
from tpctl.planning.model_sizes import ModelSizes
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig

SIZES = LatentSizes(q_rank=None, kv_rank=12, nope=6, rope=4, value=5)
DEEPSEEK = LatentSizes(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)
HEADS, LENGTH = 3, 7


def up_of(sizes: LatentSizes, heads: int = HEADS) -> LatentUp:
    rows = heads * (sizes.nope + sizes.value)
    held: Any = SimpleNamespace(
        in_features=sizes.kv_rank, out_features=rows, shapes={"weight": (rows, sizes.kv_rank)}, is_dense=True, kept=()
    )
    up = LatentUp(held, sizes, torch.float32)
    up.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return up


def by_definition(q_ND: Tensor, kept_LC: Tensor, up: LatentUp) -> Tensor:
    """[N, V]: the last token's attention, a head and a key after the other, in float64."""
    q_ND, kept_LC, weight = q_ND.double(), kept_LC.double(), up.weight.double()
    found = []
    for head, q in enumerate(q_ND):
        rows = weight[head * 11 : (head + 1) * 11]
        keys = [torch.cat((rows[:6] @ kept[:12], kept[12:])) for kept in kept_LC]
        weights = torch.stack([q @ key for key in keys]).softmax(0)
        found.append(sum(weight * (rows[6:] @ kept[:12]) for weight, kept in zip(weights, kept_LC, strict=True)))
    return torch.stack(found).float()


def test_both_forms_are_the_definition() -> None:
    rng, up = torch.Generator().manual_seed(0), up_of(SIZES)
    q_ND, kept_LC = (torch.randn(size, generator=rng) for size in ((HEADS, 10), (LENGTH, 16)))
    expected = by_definition(q_ND, kept_LC, up)
    weights_NL = (up.absorb(q_ND[None])[0] @ kept_LC.T).softmax(-1)
    torch.testing.assert_close(up.values((weights_NL @ kept_LC[:, :12])[None])[0], expected, rtol=1e-4, atol=1e-5)
    for heads in (slice(0, 3), slice(1, 2), slice(1, 3)):
        keys, values = (one[0] for one in up.expand(kept_LC[None], heads))
        weights = torch.einsum("nd,nld->nl", q_ND[heads], keys).softmax(-1)
        torch.testing.assert_close(torch.einsum("nl,nlv->nv", weights, values), expected[heads], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [SIZES, DEEPSEEK])
@pytest.mark.parametrize(("new", "length"), [(1, 1), (1, 2), (1, 5000), (7, 7), (40, 41), (100, 5000), (300, 5000)])
def test_the_form_of_fewer_products_is_taken(sizes: LatentSizes, new: int, length: int) -> None:
    pairs = sum(length - new + 1 + query for query in range(new))
    of_one = sizes.kv_rank * (sizes.nope + sizes.value)
    plain = pairs * (sizes.key + sizes.value) + length * of_one
    absorbed = pairs * (sizes.kept + sizes.kv_rank) + new * of_one
    assert up_of(sizes, 1).absorbs((new, length)) is (absorbed < plain)


def test_what_is_taken_of_a_model_of_deepseeks_size() -> None:
    """Decodes and short chunks over long prefixes absorb; a prompt does not, nor a chunk of the usual size."""
    up = up_of(DEEPSEEK, 1)
    assert up.absorbs((1, 2)) and up.absorbs((64, 5000)) and not up.absorbs((1, 1))
    assert not up.absorbs((2048, 2048)) and not up.absorbs((2048, 100_000))
    assert up.absorbs((8, 100_000), (40, 40)) and not up.absorbs((8, 1000), (2048, 2048))


def test_heads_are_made_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mixture("deepseek_v3", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "tp1", 1)
    made: list[int] = []
    expand = LatentUp.expand

    def counted(self: LatentUp, kept_SLC: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        made.append(heads.stop - heads.start)
        return expand(self, kept_SLC, heads)

    monkeypatch.setattr(LatentUp, "expand", counted)
    monkeypatch.setattr(sdpa_latent, "_MOST_MADE", 2 * 5 * 15 * 4)  # of the first chunk four heads, of the next fewer
    prompts = torch.randint(3, 131, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompts).logits
    torch.testing.assert_close(logits_of(tmp_path / "tp1", 1, prompts.tolist()), expected, rtol=0, atol=1e-4)
    assert made[:2] == [4, 2] and made.count(2) > made.count(4)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_every_rank_keeps_one_vector_a_token(tmp_path: Path, tp_size: int) -> None:
    """As it is planned, and counted: 12 + 4 numbers in each of three layers, whatever the heads."""
    make_mixture("deepseek_v3", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "out", tp_size)
    report = plan_model(read_metadata(str(tmp_path / "model")), Budget(), tp_size=tp_size)
    assert [rank.kv_bytes_per_token for rank in report.ranks] == [3 * 16 * 4] * tp_size

    def rank(group: TPGroup) -> tuple[Any, list[Any]]:
        settings = EngineConfig(tmp_path / "out", tp_size, kv_cache_memory=100_000, block_size=4)
        with torch.inference_mode():
            runner = make_runner(settings, group)
        return runner.info(), runner.kv

    for info, kv in run_ranks(tp_size, rank):
        assert info.num_blocks == 100_000 // (4 * 3 * 16 * 4)
        assert info.kv_cache_bytes == info.num_blocks * 4 * report.ranks[0].kv_bytes_per_token
        for one in kv:  # and a block that stays empty
            assert isinstance(one, LatentKV) and one.k.data_ptr() == one.v.data_ptr()
            assert one.blocks.nbytes * 3 == (info.num_blocks + 1) * 4 * report.ranks[0].kv_bytes_per_token


@pytest.mark.parametrize("packer", ["fp8 of other blocks", "ct int4"])
def test_numbers_of_kv_b_are_counted(tmp_path: Path, packer: str) -> None:
    made = model_of("deepseek_v3", PACKERS[packer], kv_lora_rank=32, q_lora_rank=32)
    made.save(tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 1, dtype="bfloat16")
    tensors = dict(Manifest.load(tmp_path / "out").shard(0).tensors)
    with torch.inference_mode():
        runner = make_runner(EngineConfig(tmp_path / "out", 1, kv_cache_memory=1 << 20), TPGroup())
    ups = [one for one in runner.model.modules() if isinstance(one, LatentUp)]
    assert [one.weight.dtype for one in ups] == [torch.bfloat16] * 2
    held = [parameter.nbytes for one in ups for parameter in one.parameters()]
    plan, blueprint = build_plan(runner.loaded.config, 1), runner.loaded.config.blueprint
    rest = {name: tensor for name, tensor in tensors.items() if ".kv_b_proj." not in name}
    counted = [run_bytes(plan, blueprint, some, torch.bfloat16) for some in (tensors, rest)]
    assert counted[0] - counted[1] == sum(held) == 2 * 66 * 32 * 2
    (rank,) = plan_model(read_metadata(str(tmp_path / "out")), Budget(), tp_size=1).ranks
    assert rank.weight_bytes + rank.growth_bytes == counted[0]


def test_other_backends_and_caches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in ("deepseek_v3", "kimi_k2"):
        ModelConfig.from_dict({"model_type": model_type}).blueprint.check_runs("cuda")
    make_mixture("deepseek_v3", tmp_path / "model")
    planned = local_answer("plan model", tmp_path)
    assert "not on GPUs" not in planned.out, planned
    layer = AttentionSpec(6, 1, 16, 0.5, latent=12, made=11)
    monkeypatch.setattr(select, "find_spec", lambda name: name)  # as if there were Triton
    with pytest.raises(UsageError, match=r"flash-attn knows no latent attention, .*; use --attention-backend triton"):
        select.make_backend("flash-attn", "cuda", torch.bfloat16, [layer], 128)
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 1)
    with pytest.raises(UsageError, match=r"fp8 needs keys and values of heads, not latent attention, .*; use auto"):
        make_runner(EngineConfig(tmp_path / "out", 1, kv_cache_dtype="fp8"), TPGroup())


@pytest.mark.parametrize(("tp_size", "step"), [(1, 64), (4, 16)])
def test_room_for_keys_that_are_made_is_planned(tmp_path: Path, tp_size: int, step: int) -> None:
    """And taken: six heads, cut, make 6 + 5 numbers of each of the cache's rows of 16."""
    make_mixture("deepseek_v3", tmp_path / "model")
    metadata = read_metadata(str(tmp_path / "model"))
    sizes = ModelSizes(ModelConfig.load(tmp_path / "model"), metadata, None)
    heads = [2, 2, 1, 1] if tp_size == 4 else [6]
    for rank, count in enumerate(heads):
        tokens = min(8 * step, step + 128)
        assert sizes.unpacked_bytes(tp_size, rank, step, 128) == 4 * tokens * (16 + 11 * count)
