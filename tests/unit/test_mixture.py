"""Experts in shards: stacked from both forms that checkpoints have, cut inside or dealt, and put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config, read_tensors, write_checkpoint
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.safetensors import TensorSpec
from tpctl.errors import CheckpointError, PartitionError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving.opened import tensor_infos
from tpctl.sharding.proving.compare import verify_source

EXPERTS, WIDTH, HIDDEN = 6, 40, 24
SMALL: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "num_experts_per_tok": 2}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}
AT = "model.layers.1.mlp.experts"


def config_of(**changes: Any) -> dict[str, Any]:
    return make_config("qwen3_moe", **SMALL, **changes)


def held(folder: Path, rank: int, name: str) -> np.ndarray[Any, Any]:
    """A stored tensor as raw elements."""
    info, path = tensor_infos(folder, Manifest.load(folder), rank)[name]
    data = path.read_bytes()[info.start : info.stop]
    return np.frombuffer(data, f"<u{info.nbytes // int(np.prod(info.shape))}").reshape(info.shape)


def stacked_source(folder: Path, **changes: Any) -> Path:
    """The same random model with its experts stacked, as some checkpoints have them."""
    apart = make_checkpoint(folder / "apart", config_of(**changes))
    tensors = read_tensors(apart)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors.pop(f"{at}.{n}.{kind}_proj.weight") for n in range(EXPERTS)] for kind in ("gate", "up", "down")
        ]
        gate, up, down = (np.stack(one) for one in each)
        tensors[f"{at}.gate_up_proj"], tensors[f"{at}.down_proj"] = np.concatenate([gate, up], axis=1), down
    return write_checkpoint(folder / "stacked", config_of(**changes), tensors)


@pytest.mark.parametrize("quantised", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_what_is_cut_is_put_together_again(tmp_path: Path, tp_size: int, quantised: bool) -> None:
    source = make_checkpoint(
        tmp_path / "source", config_of(**({"quantization_config": FP8} if quantised else {})), files=2
    )
    for cutting in {Cutting(), Cutting(even=True), Cutting(tp_size), Cutting(2 if tp_size == 4 else 1)}:
        shard_checkpoint(source, tmp_path / "shards", tp_size, cutting=cutting, force=True)
        verify_source(tmp_path / "shards", Manifest.load(tmp_path / "shards"), range(tp_size), source)
        merge_shards(tmp_path / "shards", tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
        other = Cutting(1, cutting.even)
        reshard(tmp_path / "shards", tmp_path / "again", 3, cutting=other, force=True)
        shard_checkpoint(source, tmp_path / "direct", 3, cutting=other, force=True)
        assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "direct")


def test_both_forms_of_a_checkpoint_give_the_same_shards(tmp_path: Path) -> None:
    stacked = stacked_source(tmp_path)
    for cutting in (Cutting(), Cutting(2), Cutting(4)):
        for form in ("apart", "stacked"):
            shard_checkpoint(tmp_path / form, tmp_path / f"{form}-4", 4, cutting=cutting, force=True)
        for rank in range(4):
            for name in Manifest.load(tmp_path / "apart-4").tensors(rank):
                one, other = (held(tmp_path / f"{form}-4", rank, name) for form in ("apart", "stacked"))
                assert np.array_equal(one, other), name
        merge_shards(tmp_path / "stacked-4", tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(stacked)


def test_ranks_hold_their_part_of_every_expert_or_every_part_of_their_experts(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", config_of())
    tensors = read_tensors(source)
    gate, up, down = (
        np.stack([tensors[f"{AT}.{n}.{kind}_proj.weight"] for n in range(EXPERTS)]) for kind in ("gate", "up", "down")
    )
    shard_checkpoint(source, tmp_path / "inside", 2)
    shard_checkpoint(source, tmp_path / "dealt", 2, cutting=Cutting(2))
    shard_checkpoint(source, tmp_path / "both", 4, cutting=Cutting(2))
    for rank in range(2):
        mine, own = slice(rank * 20, rank * 20 + 20), slice(rank * 3, rank * 3 + 3)
        both = np.concatenate([gate[:, mine], up[:, mine]], axis=1)
        assert np.array_equal(held(tmp_path / "inside", rank, f"{AT}.w13_weight"), both)
        assert np.array_equal(held(tmp_path / "inside", rank, f"{AT}.w2_weight"), down[:, :, mine])
        both = np.concatenate([gate[own], up[own]], axis=1)
        assert np.array_equal(held(tmp_path / "dealt", rank, f"{AT}.w13_weight"), both)
        assert np.array_equal(held(tmp_path / "dealt", rank, f"{AT}.w2_weight"), down[own])
        assert np.array_equal(held(tmp_path / "both", 2 + rank, f"{AT}.w2_weight"), down[3:, :, mine])


def test_a_scale_is_where_its_block_is(tmp_path: Path) -> None:
    """40 = 2.5 blocks of 16: ranks get whole blocks; with even borders the block between them has its scale on both."""
    source = make_checkpoint(tmp_path / "source", config_of(quantization_config=FP8))
    tensors = read_tensors(source)
    gate = np.stack([tensors[f"{AT}.{n}.gate_proj.weight_scale_inv"] for n in range(EXPERTS)])
    up = np.stack([tensors[f"{AT}.{n}.up_proj.weight_scale_inv"] for n in range(EXPERTS)])
    name = f"{AT}.w13_weight_scale_inv"
    shard_checkpoint(source, tmp_path / "blocks", 2)
    shard_checkpoint(source, tmp_path / "even", 2, cutting=Cutting(even=True))
    for folder, rows in (("blocks", [(0, 2), (2, 3)]), ("even", [(0, 2), (1, 3)])):
        for rank, (first, stop) in enumerate(rows):
            wanted = np.concatenate([gate[:, first:stop], up[:, first:stop]], axis=1)
            assert np.array_equal(held(tmp_path / folder, rank, name), wanted)


def test_experts_cannot_be_dealt_to_more_groups_than_there_are() -> None:
    with pytest.raises(PartitionError, match="8 groups of ranks cannot share 6 experts; use an --ep of at most 6 that"):
        ModelConfig.from_dict(config_of(), cutting=Cutting(8))
    with pytest.raises(PartitionError, match="4 ranks do not form 3 equal groups"):
        build_plan(ModelConfig.from_dict(config_of(), cutting=Cutting(3)), 4)
    with pytest.raises(PartitionError, match="the model has no experts"):
        ModelConfig.from_dict(make_config("llama"), cutting=Cutting(2))


def test_a_scale_of_another_dtype_or_a_missing_expert_is_refused(tmp_path: Path) -> None:
    config = config_of(quantization_config=FP8)
    source = make_checkpoint(tmp_path / "source", config)
    tensors = read_tensors(source)
    name = f"{AT}.5.down_proj.weight_scale_inv"
    wrong = {**tensors, name: tensors[name].astype("<u8")}
    specs = [TensorSpec(name, "F64", tensors[name].shape)]
    write_checkpoint(tmp_path / "wrong", config, wrong, specs)
    with pytest.raises(CheckpointError, match=rf"{name} is F64, but its format has F32 or "):
        shard_checkpoint(tmp_path / "wrong", tmp_path / "out", 2)
    write_checkpoint(tmp_path / "lost", config, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"no tensor {name} \(2 x 5 expected"):
        shard_checkpoint(tmp_path / "lost", tmp_path / "out", 2)
