"""Proof of a shard folder: any damage is found and named, any difference from the source too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.checkpoint.safetensors import NewTensor, read_header
from tpctl.errors import CheckpointError, ShardFolderError
from tpctl.partition.manifest import MANIFEST, Manifest
from tpctl.sharding.inspect import inspect_shards, source_at_hand
from tpctl.sharding.shard import shard_checkpoint

TABLE = NewTensor("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (3,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in ``model`` and its shards in ``out``; tests put back what they change."""
    folder = tmp_path_factory.mktemp("verify")
    source = make_checkpoint(folder / "model", make_config("llama"), files=2, extra=[TABLE])
    shard_checkpoint(source, folder / "out", 3, max_part_size=6000)
    return folder


def test_intact_shards_pass_with_and_without_the_source(made: Path) -> None:
    out = made / "out"
    report = inspect_shards(out, verify=True, source=made / "model")
    assert report.verified is not None
    manifest = Manifest.load(out)
    data = sum(info.nbytes for path in out.glob("*.safetensors") for info in read_header(path).tensors.values())
    copied = sum((out / name).stat().st_size for name in manifest.files)
    assert report.verified.hashed_bytes == data + copied
    assert report.verified.compared_bytes == data - TABLE.nbytes
    assert inspect_shards(out).verified is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found_and_named(made: Path, data: st.DataObject) -> None:
    out = made / "out"
    path = data.draw(st.sampled_from(sorted(out.iterdir())))
    raw = path.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
    try:
        with pytest.raises(ShardFolderError) as caught:
            inspect_shards(out, verify=True)
    finally:
        path.write_bytes(raw)
    message = str(caught.value)
    assert "\n" not in message
    if path.name == MANIFEST:
        return
    assert path.name in message
    if path.name.startswith("model-rank"):
        rank = path.name.split("-")[2]
        assert f"rank {rank}" in message
        header = read_header(path)
        inside = [n for n, info in header.tensors.items() if info.start <= place < info.stop]
        assert any(name in message for name in inside or header.tensors)


def test_a_flipped_bit_that_is_the_same_in_both_copies_of_nothing_else_is_found(made: Path) -> None:
    """The digests match, the source differs: only the comparison with the source can tell."""
    source = made / "model" / "model-00001-of-00002.safetensors"
    raw = source.read_bytes()
    header = read_header(source)
    name = next(name for name in header.tensors if name.endswith("q_proj.weight"))
    info = header.tensors[name]
    source.write_bytes(raw[: info.stop - 1] + bytes([raw[info.stop - 1] ^ 4]) + raw[info.stop :])
    try:
        inspect_shards(made / "out", verify=True)
        with pytest.raises(ShardFolderError, match=r"qkv_proj\.weight of rank 2 differs .*row 23, column 23"):
            inspect_shards(made / "out", source=made / "model")
        inspect_shards(made / "out", source=made / "model", ranks=[0, 1])
    finally:
        source.write_bytes(raw)


def test_casts_are_compared_too(made: Path, tmp_path: Path) -> None:
    shard_checkpoint(made / "model", tmp_path / "cast", 2, dtype="float32")
    report = inspect_shards(tmp_path / "cast", verify=True, source=made / "model")
    assert report.verified is not None
    assert report.verified.compared_bytes > 0


def test_a_source_that_lacks_a_tensor(made: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", make_config("phi3"))
    with pytest.raises(CheckpointError, match=r"it is not what .* was cut from"):
        inspect_shards(made / "out", source=other)


def test_truncated_and_missing_parts_name_the_rank(made: Path) -> None:
    path = made / "out" / "model-rank-1-part-1.safetensors"
    raw = path.read_bytes()
    try:
        os.truncate(path, 100)
        with pytest.raises(ShardFolderError, match=f"rank 1\\) has 100 bytes, but {len(raw)} by the manifest"):
            inspect_shards(made / "out")
        path.unlink()
        with pytest.raises(ShardFolderError, match=r"rank 1\) cannot be read: No such file"):
            inspect_shards(made / "out")
        inspect_shards(made / "out", ranks=[0])
    finally:
        path.write_bytes(raw)


def test_a_missing_copied_file(made: Path) -> None:
    path = made / "out" / "tokenizer.json"
    raw = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(ShardFolderError, match=r"tokenizer\.json cannot be read"):
            inspect_shards(made / "out", verify=True)
    finally:
        path.write_bytes(raw)


def test_the_source_is_at_hand_only_while_it_is_the_same(made: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", make_config())
    shard_checkpoint(source, tmp_path / "out", 2, source_id=str(source))
    manifest = Manifest.load(tmp_path / "out")
    assert source_at_hand(manifest) == source
    assert source_at_hand(Manifest.load(made / "out")) is None
    (source / "model.safetensors").unlink()
    assert source_at_hand(manifest) is None
