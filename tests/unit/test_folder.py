"""Opening checkpoint folders: one file or an index, and everything that can be wrong with either."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config, source_shapes
from tpctl.checkpoint.folder import INDEX, CheckpointFolder
from tpctl.errors import CheckpointError


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
        ("{", "is no index"),
        ("{}", "is no index"),
        ("[" * 100_000, "is no index"),
        ('{"weight_map": []}', "is no index"),
        ('{"weight_map": {}}', "lists no files"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "which is not a file name"),
    ],
)
def test_bad_indexes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder.open(tmp_path)


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
