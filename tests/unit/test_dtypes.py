"""Dtypes: values that a cast cannot hold, and tensors that are stored as one but not in one dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.client.conversation import recommended_sampling
from tpctl.client.prepare import EngineArgs, configure
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import (
    CheckpointError,
    MixedDtypesError,
    OverflowedError,
    ShardFolderError,
    UnsupportedModelError,
)
from tpctl.manifest.manifest import Manifest
from tpctl.models.loader import _converted
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig


def test_q_and_k_of_different_dtypes_need_a_cast(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", make_config(), files=2)
    path = source / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "k_proj" in name)
    tensors[name] = tensors[name].float()
    save_file(tensors, path)
    with pytest.raises(MixedDtypesError, match="cannot hold both, cast with --dtype float32, bfloat16, float16"):
        shard_checkpoint(source, tmp_path / "out", 2)
    with pytest.raises(MixedDtypesError, match="cannot hold both"):  # plan says so too
        plan_model(read_metadata(str(source)), Budget())
    assert shard_checkpoint(source, tmp_path / "out", 2, dtype="float32").dtype == "F32"
    merge_shards(tmp_path / "out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / path.name)
    for one, values in load_file(path).items():
        assert torch.equal(merged[one].nan_to_num(1), values.float().nan_to_num(1)), one


def test_mixed_dtypes_take_the_cast_that_chat_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    source = make_checkpoint(tmp_path / "model", make_config(dtype="float32"), dtype="F16")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "k_proj" in name)
    save_file({**tensors, name: tensors[name].float()}, source / "model.safetensors")
    found = ResolvedSource(source, "model", None)
    with pytest.raises(MixedDtypesError, match="cast with --dtype"):
        configure(found, EngineArgs(device="cpu"))
    config = configure(found, EngineArgs(device="cpu", dtype="float32"))
    assert Manifest.load(config.shard_dir).dtype == "F32"
    assert config.text_dir == source
    # What the front says of a file names the user's, not the copy in the cache.
    (source / "tokenizer.json").write_text("{")
    (source / "generation_config.json").write_text('{"temperature": -1}')
    config = configure(found, EngineArgs(device="cpu", dtype="float32"))
    with pytest.raises(CheckpointError, match=f"^{source / 'tokenizer.json'} is not a tokenizer"):
        Tokenizer(config.text_dir)
    with pytest.raises(CheckpointError, match=f"^{source / 'generation_config.json'}: temperature"):
        recommended_sampling(config.text_dir)
    config.save(tmp_path / "engine.json")
    assert EngineConfig.load(tmp_path / "engine.json") == config


def with_value(folder: Path, tensor: str, value: float, dtype: torch.dtype) -> Path:
    """A checkpoint of zeros with ``value``, an infinity and no number in one tensor."""
    make_checkpoint(folder, make_config())
    tensors = {
        name: torch.zeros_like(one, dtype=dtype) for name, one in load_file(folder / "model.safetensors").items()
    }
    tensors[tensor].view(-1)[7:10] = torch.tensor([value, float("inf"), float("nan")], dtype=dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "message"),
    [
        (-70000.0, torch.bfloat16, "float16", r"-70144, beyond the range of float16 \(at most 65504\); use --dtype bf"),
        (65520.0, torch.float32, "float16", "65520, beyond the range of float16"),
        (3.4e38, torch.float32, "bfloat16", r"3.4e\+38, beyond the range of bfloat16 \(at most 3.38953e\+38\)"),
        (1e39, torch.float64, "float32", r"1e\+39, beyond the range of float32"),
        (65519.0, torch.float32, "float16", None),
        (3.38e38, torch.float32, "bfloat16", None),
    ],
)
def test_values_beyond_the_range_of_a_cast(
    tmp_path: Path, value: float, stored: torch.dtype, dtype: str, message: str | None
) -> None:
    source, out = with_value(tmp_path / "model", NAME, value, stored), tmp_path / "out"
    if message is not None:
        with pytest.raises(OverflowedError, match=rf"^{NAME} holds {message}.*--allow-overflow"):
            shard_checkpoint(source, out, 2, dtype=dtype, max_part_size=4000)
        assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == ["model"]
    shard_checkpoint(source, out, 2, dtype=dtype, allow_overflow=message is not None)
    cast = load_file(out / "model-rank-0-part-0.safetensors")[NAME].view(-1)[7:10]
    wanted = torch.tensor([value, float("inf"), float("nan")], dtype=stored).to(cast.dtype)
    assert torch.equal(cast.nan_to_num(1, posinf=2, neginf=3), wanted.nan_to_num(1, posinf=2, neginf=3))


def test_a_run_that_may_overflow_is_not_gone_on_with_by_one_that_may_not(tmp_path: Path) -> None:
    source, out = with_value(tmp_path / "model", NAME, 7e4, torch.bfloat16), tmp_path / "out"

    def killed(done: int, total: int, what: str) -> None:
        if done > total * 0.9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard_checkpoint(source, out, 2, dtype="float16", allow_overflow=True, max_part_size=3000, progress=killed)
    with pytest.raises(OverflowedError):
        shard_checkpoint(source, out, 2, dtype="float16", max_part_size=3000)


def test_the_engine_refuses_what_its_dtype_cannot_hold() -> None:
    """At loading, where shards are run in a narrower dtype than they are stored in."""
    infinite = torch.tensor([float("inf"), float("nan"), 65504.0], dtype=torch.bfloat16)
    assert _converted("w", infinite[:2], torch.float16).isfinite().sum() == 0
    with pytest.raises(OverflowedError, match=r"^w holds 65536, beyond the range of float16 \(at most 65504\); use a"):
        _converted("w", infinite, torch.float16)
    with pytest.raises(OverflowedError, match="beyond the range of bfloat16"):
        _converted("w", torch.tensor([1.0, 3.4e38]), torch.bfloat16)
    assert torch.equal(_converted("w", torch.tensor([6e4]), torch.float16), torch.tensor([6e4], dtype=torch.float16))


def stored_as(folder: Path, tensor: str, dtype: torch.dtype) -> Path:
    """A checkpoint with one tensor of another dtype."""
    make_checkpoint(folder, make_config())
    tensors = load_file(folder / "model.safetensors")
    values = torch.arange(tensors[tensor].numel()).remainder(250).to(torch.uint8).reshape(tensors[tensor].shape)
    tensors[tensor] = values.view(dtype) if dtype.itemsize == 1 and dtype != torch.bool else values.to(dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_floats_of_8_bits_are_floats(tmp_path: Path, stored: torch.dtype, dtype: str | None) -> None:
    source, out = stored_as(tmp_path / "model", NAME, stored), tmp_path / "out"
    weight = load_file(source / "model.safetensors")[NAME]
    report = shard_checkpoint(source, out, 1, dtype=dtype, allow_overflow=True)
    found = load_file(out / "model-rank-0-part-0.safetensors")[NAME]
    wanted = weight if dtype is None else weight.to(getattr(torch, dtype))
    assert (report.dtype is None) is (dtype is None) and found.dtype == wanted.dtype
    assert torch.equal(found.float().nan_to_num(), wanted.float().nan_to_num())
    if dtype is None:
        assert torch.equal(_converted(NAME, found, torch.bfloat16).float().nan_to_num(), weight.float().nan_to_num())
    merge_shards(out, tmp_path / "merged")
    assert torch.equal(
        load_file(tmp_path / "merged/model.safetensors")[NAME].float().nan_to_num(), wanted.float().nan_to_num()
    )


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.bool, torch.int32])
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_weights_that_are_no_floats_are_refused_by_name(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    source = stored_as(tmp_path / "model", NAME, stored)
    said = rf"^{NAME} is (I8|U8|BOOL|I32), but weights are floats; the checkpoint is quantised, without scales; use its"
    with pytest.raises(UnsupportedModelError, match=said):
        shard_checkpoint(source, tmp_path / "out", 2, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match=said):
        plan_model(read_metadata(str(source)), Budget())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ShardFolderError, match=rf"^{NAME} is u?(int8|bool|int32) in the shard, but weights are floats"):
        _converted(NAME, load_file(source / "model.safetensors")[NAME], torch.bfloat16)
