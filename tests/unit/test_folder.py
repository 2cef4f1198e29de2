"""Opening checkpoint folders: one file or an index, and everything that can be wrong with either."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config, read_tensors, source_shapes
from tpctl.checkpoint.folder import INDEX, SINGLE, CheckpointFolder
from tpctl.checkpoint.hub import RemoteFile, RemoteModel, needed_files
from tpctl.checkpoint.hub_cache import index_files
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.safetensors import TensorSpec
from tpctl.checkpoint.sources import resolve
from tpctl.errors import CheckpointError, SourceError, TpctlError
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint


@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_is_found(tmp_path: Path, files: int) -> None:
    config = make_config()
    folder = CheckpointFolder.open(make_checkpoint(tmp_path / "c", config, files=files))
    assert folder.shapes == source_shapes(config)
    assert len(folder.files) == files
    assert [path.name for path in folder.small_files()] == ["LICENSE", "config.json", "tokenizer.json"]


def test_weights_indexes_and_hidden_files_are_no_small_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config(), files=2)
    for name in ("pytorch_model.bin", "model.gguf", ".gitattributes", "pytorch_model.bin.index.json"):
        (folder / name).write_text("x")
    (folder / "chat_template.jinja").write_text("x")
    names = [path.name for path in CheckpointFolder.open(folder).small_files()]
    assert names == ["LICENSE", "chat_template.jinja", "config.json", "tokenizer.json"]


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config(), files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model-00002-of-00003\.safetensors, which its .* lists"):
        CheckpointFolder.open(folder)


def test_an_index_that_names_a_tensor_wrongly(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config(), files=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds ghost, but it does not"):
        CheckpointFolder.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "is no index"),
        ("[" * 100_000, "is nested more than 64 levels deep"),
        ('{"weight_map": []}', "is no index"),
        ('{"weight_map": {"a": 5}}', "lists 5, which is not a file name"),
        ('{"weight_map": {"a": ["x"]}}', r'lists \["x"\], which is not a file name'),
        ('{"weight_map": {"a": ""}}', 'lists "", which is not a file name'),
        ('{"weight_map": {"a": "x", "a": "y"}}', '"a" occurs twice, as "x" and as "y"'),
        ("7", "holds a number, but a JSON object is needed"),
        ('{"weight_map": {}}', "lists no files"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "which is not a file name"),
    ],
)
def test_bad_indexes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=message):  # as what looks for a model's files reads it
        index_files(tmp_path / INDEX)


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_one_file_comes_before_a_stale_index(tmp_path: Path, shards_are_there: bool) -> None:
    """As in transformers: what an earlier save left is not the model, even if it is all there."""
    folder = make_checkpoint(tmp_path / "c", make_config(), files=2, seed=1)
    if not shards_are_there:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    new = make_checkpoint(tmp_path / "new", make_config(), seed=2) / SINGLE
    shutil.copy(new, folder / SINGLE)
    opened = CheckpointFolder.open(folder)
    assert ([file.name for file in opened.files], opened.index) == ([SINGLE], None)
    said: list[str] = []
    assert resolve(str(folder), notify=said.append).folder == folder
    assert len(said) == 1 and said[0].startswith(f"using {folder / SINGLE}, as transformers does")
    shard_checkpoint(folder, tmp_path / "out", 2)
    merge_shards(tmp_path / "out", tmp_path / "merged")
    assert (tmp_path / "merged" / SINGLE).read_bytes() == new.read_bytes()
    assert not (tmp_path / "merged" / INDEX).exists()


def test_an_index_of_the_one_file_belongs_to_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config())
    text = json.dumps({"weight_map": dict.fromkeys(read_tensors(folder), SINGLE)})
    (folder / INDEX).write_text(text)
    assert CheckpointFolder.open(folder).index == text


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "adapter_model.safetensors").touch()
    message = "lora is an adapter .* only changes to org/base; merge it into its base model first"
    for read in (resolve, read_metadata):
        with pytest.raises(CheckpointError, match=message):
            read(str(folder))
    (folder / "config.json").write_text(json.dumps(make_config()))
    for read in (resolve, read_metadata, lambda name: CheckpointFolder.open(Path(name))):
        with pytest.raises(CheckpointError, match=message):
            read(str(folder))
    whole = make_checkpoint(tmp_path / "c", make_config())
    shutil.copy(folder / "adapter_config.json", whole)
    CheckpointFolder.open(whole)  # what a merged model may still have
    shutil.copy(folder / "adapter_model.safetensors", whole)
    with pytest.raises(CheckpointError, match=r"holds a model and an adapter \(adapter_config.json\) that changes it"):
        resolve(str(whole))


def test_a_repository_is_judged_as_a_folder_is() -> None:
    def repository(*names: str) -> RemoteModel:
        return RemoteModel("org/x", "0" * 40, tuple(RemoteFile(name, 1, None) for name in ("config.json", *names)))

    both = needed_files(repository(SINGLE, INDEX, "model-00001-of-00001.safetensors"), None)
    assert [file.name for file in both] == ["config.json", SINGLE]
    with pytest.raises(SourceError, match=r"org/x holds an adapter \(adapter_config.json\); merge it into its base"):
        needed_files(repository("adapter_config.json", "adapter_model.safetensors"), None)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", r"is quantised \(AWQ or GPTQ: it holds .*qweight\)"),
        ("model.layers.0.self_attn.q_proj.qzeros", r"is quantised \(AWQ or GPTQ"),
        ("model.layers.0.self_attn.q_proj.scales", r"is quantised \(AWQ or GPTQ"),
        ("model.layers.0.self_attn.q_proj.g_idx", r"is quantised \(GPTQ"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", r"is quantised \(FP8 in blocks"),
        ("model.layers.0.self_attn.q_proj.weight_scale", r"is quantised \(FP8 or compressed-tensors"),
        ("model.layers.0.self_attn.k_proj.k_scale", r"is quantised \(FP8 or compressed-tensors"),
        ("model.layers.0.self_attn.q_proj.scale_weight", r"is quantised \(FP8 or integers with scales"),
        ("model.layers.0.self_attn.q_proj.act_scale", r"is quantised \(FP8 or integers with scales"),
        ("model.layers.0.self_attn.q_proj.scale", r"is quantised \(FP8 or integers with scales"),
        ("model.layers.0.self_attn.q_proj.weight_scale_2", r"is quantised \(NVFP4"),
        ("model.layers.0.self_attn.q_proj.input_zero_point", r"is quantised \(compressed-tensors"),
        ("model.layers.0.self_attn.q_proj.weight_zero_point", r"is quantised \(compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_packed", r"is quantised \(compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight.absmax", r"is quantised \(bitsandbytes"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", r"is quantised \(MXFP4"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", r"is a mixture of experts \(it holds .*experts\.7.*by config"),
        ("model.layers.0.block_sparse_moe.gate.weight", "is a mixture of experts .* do not belong together"),
        ("model.layers.0.self_attn.kv_b_proj.weight", r"is latent attention \(MLA\) .* do not belong together"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", r"is an adapter \(LoRA\) .* merge it into its base model"),
        ("model.visual.patch_embed.proj.weight", "is a model of images or sound"),
        ("model.layers.0.surprise.weight", "holds a tensor that this architecture does not use"),
    ],
)
def test_tensors_that_show_another_kind_of_model(tmp_path: Path, tensor: str, message: str) -> None:
    config = make_config()
    folder = make_checkpoint(tmp_path / "c", config, dtype="F16", extra=[TensorSpec(tensor, "I32", (2,))])
    with pytest.raises(TpctlError, match=message):
        shard_checkpoint(folder, tmp_path / "out", 2)
    with pytest.raises(TpctlError, match=message):
        plan_model(read_metadata(str(folder)), Budget())


def test_an_index_that_is_no_text(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config(), files=2)
    (folder / INDEX).write_bytes(b'{"weight_map": {"caf\xe9": 1}}')
    with pytest.raises(CheckpointError, match=r"index\.json is not UTF-8 text \(byte 20 is 0xe9\); download it again"):
        CheckpointFolder.open(folder)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config(), files=2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    index = json.loads((folder / INDEX).read_text())
    held = {name: file for name, file in index["weight_map"].items() if file == first.name}
    index["weight_map"] = {**held, next(iter(held)): second.name}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"is in {first.name} and in {second.name}"):
        CheckpointFolder.open(folder)


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        CheckpointFolder.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        CheckpointFolder.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(CheckpointError, match="only PyTorch pickles"):
        CheckpointFolder.open(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_text("x")
    with pytest.raises(CheckpointError, match="2 safetensors files but no"):
        CheckpointFolder.open(tmp_path)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    folder = CheckpointFolder.open(make_checkpoint(tmp_path / "c", make_config()))
    folder.check_unchanged()
    path = folder.files[0].path
    os.utime(path, ns=(0, 1))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        folder.check_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match="went away while it was read"):
        folder.check_unchanged()


def test_the_digest_of_a_file_in_the_hubs_cache_is_its_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", make_config())
    assert CheckpointFolder.open(folder).files[0].sha256 is None
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert CheckpointFolder.open(folder).files[0].sha256 == "ab" * 32
