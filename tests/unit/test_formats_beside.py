"""ModelOpt's checkpoints of which ``hf_quant_config.json`` alone says how they are stored, ``config.json`` nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import NotASafetensorsRepoError

from tests.unit.packers import PACKERS
from tests.unit.quantised_model import quantise
from tests.unit.synthetic import folder_bytes, make_config
from tpctl.arch.config import ModelConfig
from tpctl.checkpoint import metadata
from tpctl.checkpoint.hub import RemoteFile, RemoteModel, needed_files
from tpctl.errors import ShardFolderError, UnsupportedModelError
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.quantizing.linears import refuse_quantised
from tpctl.quantizing.schemes import Method
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.proving.compare import verify_source
from tpctl.sharding.showing.inspect import inspect_shards

BESIDE = "hf_quant_config.json"
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 1}


def said(algorithm: str | None = "NVFP4", producer: str | None = "modelopt", **more: Any) -> dict[str, Any]:
    """What the file holds, as ModelOpt's exporter writes it."""
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "group_size": 16, **more}
    quantization.setdefault("exclude_modules", ["lm_head"])
    return {"producer": {"name": producer, "version": "0.23.0"}, "quantization": quantization}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The checkpoint, as older exports have it."""
    made = quantise(make_config(**SIZES), PACKERS["modelopt nvfp4"])
    del made.config["quantization_config"]
    folder = made.save(tmp_path / "model")
    (folder / BESIDE).write_text(json.dumps(said()))
    return folder


def test_it_is_cut_proved_and_given_back(model: Path, tmp_path: Path) -> None:
    known = quantise(make_config(**SIZES), PACKERS["modelopt nvfp4"]).save(tmp_path / "known")
    shard_checkpoint(known, tmp_path / "as-known", 2)
    shard_checkpoint(model, tmp_path / "out", 2)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.shards == Manifest.load(tmp_path / "as-known").shards and BESIDE in manifest.files
    assert inspect_shards(tmp_path / "out", verify=True).verified
    verify_source(tmp_path / "out", manifest, range(2), model)
    reshard(tmp_path / "out", tmp_path / "three", 3)
    shard_checkpoint(model, tmp_path / "at-once", 3)
    assert folder_bytes(tmp_path / "three") == folder_bytes(tmp_path / "at-once")
    merge_shards(tmp_path / "three", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(model)


@pytest.mark.parametrize("changed", [None, said("FP8"), said(exclude_modules=["model.layers.0.mlp*"])])
def test_shards_whose_file_was_changed_are_refused_by_its_name(
    model: Path, tmp_path: Path, changed: dict[str, Any] | None
) -> None:
    shard_checkpoint(model, out := tmp_path / "out", 2)
    (out / BESIDE).unlink() if changed is None else (out / BESIDE).write_text(json.dumps(changed))
    with pytest.raises(ShardFolderError, match=rf"{BESIDE}"):
        inspect_shards(out, verify=True)


def test_a_manifest_that_does_not_list_it_is_refused(model: Path, tmp_path: Path) -> None:
    """Merged, such shards would be a checkpoint of which nothing says how it is stored."""
    shard_checkpoint(model, out := tmp_path / "out", 2)
    manifest = Manifest.load(out)
    files = {name: file for name, file in manifest.files.items() if name != BESIDE}
    (out / MANIFEST).write_text(replace(manifest, files=files).text())
    with pytest.raises(ShardFolderError, match=rf"does not list {BESIDE}, which alone says how"):
        merge_shards(out, tmp_path / "merged")


REFUSED: list[tuple[dict[str, Any], str]] = [
    (said("MIXED_PRECISION", quantized_layers={"a": {}}), r'quant_algo of ModelOpt\'s weights is "MIXED_PRECISION"'),
    (said(quantized_layers={"a": {}}), "quantized_layers gives layers of ModelOpt's weights a format each"),
    (said(None), "quant_algo of ModelOpt's weights is null"),
    (said(group_size=32), "ModelOpt's NVFP4 weights are in groups of 32"),
    (said(producer="quark"), r'it is by "quark", and tpctl knows what ModelOpt writes there'),
    ({"weights": 4}, "quant_algo of ModelOpt's weights is null"),
]


@pytest.mark.parametrize(("told", "message"), REFUSED)
def test_what_is_not_known_is_refused_by_name(told: dict[str, Any], message: str, model: Path) -> None:
    (model / BESIDE).write_text(json.dumps(told))
    with pytest.raises(UnsupportedModelError, match=rf"^{BESIDE}: {message}"):
        ModelConfig.load(model)


def test_config_json_holds_where_there_are_both(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    quantised = {**config, "quantization_config": PACKERS["modelopt nvfp4"].config}
    (model / "config.json").write_text(json.dumps(quantised))
    (model / BESIDE).write_text("{")
    assert ModelConfig.load(model).scheme is not None


def test_it_is_not_quantised_again(model: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^the model is quantised already \(by its {BESIDE}\); leave out"):
        refuse_quantised(model, [], Method.FP8)


def test_it_is_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model, and for a plan, which reads no more than headers."""
    names = ["config.json", BESIDE, "model.safetensors", "README.md"]
    remote = RemoteModel("org/model", "0" * 40, tuple(RemoteFile(name, 1, None) for name in names))
    assert [file.name for file in needed_files(remote, None)] == names[:3]
    fetched: list[str] = []

    def fetch(repo: str, filename: str, **given: Any) -> str:
        fetched.append(filename)
        return str(model / filename)

    def headers(self: object, repo: str, **given: Any) -> None:
        raise NotASafetensorsRepoError("none")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", headers)
    monkeypatch.setattr("tpctl.checkpoint.hub.ask", lambda repo, revision, token: remote)
    found = metadata.read_metadata("org/model")
    assert fetched == names[:2] and ModelConfig.load(found.folder).scheme is not None
