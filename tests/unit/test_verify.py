"""Proof of a shard folder: any damage is found and named, any difference from the source too."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.checkpoint.sources import converted_gguf, pypi_entry
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.proving.at_hand import sources_at_hand
from tpctl.sharding.showing.inspect import inspect_shards

TABLE = TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (3,))


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
    assert report.verified.compared_bytes == data + copied
    assert inspect_shards(out).verified is None


@settings(max_examples=50, deadline=None)
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
    assert path.name in message
    if path.name == MANIFEST:  # what it names is tested in test_damage
        return
    if path.name.startswith("model-rank"):
        rank = path.name.split("-")[2]
        assert f"rank {rank}" in message
        header = read_header(path)
        inside = [n for n, info in header.tensors.items() if info.start <= place < info.stop]
        text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()
        entries = re.finditer(r'"([^"]+)":\{"dtype[^}]*\}', text)
        inside += [entry[1] for entry in entries if entry.start() <= place - 8 < entry.end()]
        assert any(name in message for name in inside or header.tensors)


def test_truncated_and_missing_parts_name_the_rank(made: Path) -> None:
    path = made / "out" / "model-rank-1-part-1.safetensors"
    raw = path.read_bytes()
    try:
        os.truncate(path, 100)
        with pytest.raises(ShardFolderError, match=f"rank 1\\) has 100 bytes, but {len(raw)} by the manifest"):
            inspect_shards(made / "out")
        path.unlink()
        for verify in (False, True):
            with pytest.raises(ShardFolderError, match=r"rank 1\) cannot be read: No such file"):
                inspect_shards(made / "out", verify=verify)
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


@pytest.mark.parametrize("name", ["tokenizer.json", "model-rank-1-part-1.safetensors"])
def test_a_file_that_may_not_be_read_is_not_to_be_made_again(
    made: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever the tests are run by."""
    path, opened = made / "out" / name, Path.open

    def refuse(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ShardFolderError, match="cannot be read: Permission denied; let this user read it") as caught:
        inspect_shards(made / "out", verify=True)
    assert name in str(caught.value) and "again" not in str(caught.value)


def test_ranks_that_are_not_here_are_named_and_the_others_verified(made: Path, tmp_path: Path) -> None:
    """As after ``tpctl download --local-ranks 0``, which leaves the file of needless tensors out too."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    for path in (*out.glob("model-rank-[12]-*"), out / "tpctl-extra.safetensors"):
        path.unlink()
    report = inspect_shards(out, verify=True, source=made / "model")
    assert (report.absent, [rank.rank for rank in report.ranks]) == ((1, 2), [0, 1, 2])
    assert report.verified is not None and report.verified.ranks == (0,)
    assert report.verified.left_out == ("ranks 1-2 (files are not here)", "tpctl-extra.safetensors (not here)")
    assert 0 < report.verified.compared_bytes == report.verified.hashed_bytes < 20_000
    assert [rank.rank for rank in inspect_shards(out, ranks=[2]).ranks] == [2]
    with pytest.raises(ShardFolderError, match=r"the files of rank 2 are not in .* nothing to verify"):
        inspect_shards(out, ranks=[2], verify=True)
    part = out / "model-rank-0-part-0.safetensors"
    raw = part.read_bytes()
    part.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ShardFolderError, match="of rank 0 is damaged"):
        inspect_shards(out, verify=True)
    for path in out.glob("model-rank-*"):
        path.unlink()
    assert inspect_shards(out).absent == (0, 1, 2)
    with pytest.raises(ShardFolderError, match="the files of ranks 0-2 are not in"):
        inspect_shards(out, verify=True)


def test_what_was_not_asked_for_or_not_cut_is_left_out(made: Path, tmp_path: Path) -> None:
    shard_checkpoint(made / "model", tmp_path / "some", 3, ranks=[0, 1])
    report = inspect_shards(tmp_path / "some", ranks=[1], verify=True)
    assert report.verified is not None
    assert report.verified.left_out == ("rank 2 (not cut into this folder)", "rank 0 (not asked for)")
    everything = inspect_shards(made / "out", verify=True).verified
    assert everything is not None and everything.left_out == ()
    (made / "out" / "tpctl-extra.safetensors").rename(tmp_path / "extra")
    try:
        with pytest.raises(ShardFolderError, match=r"tpctl-extra\.safetensors \(the extra file\) cannot be read"):
            inspect_shards(made / "out", verify=True)
    finally:
        (tmp_path / "extra").rename(made / "out" / "tpctl-extra.safetensors")


@pytest.mark.parametrize(
    "name",
    ["model-rank-0-part-7.safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
)
def test_files_that_an_engine_may_load_are_reported_as_strays(made: Path, name: str) -> None:
    stray, note = made / "out" / name, made / "out" / "NOTES.md"
    stray.write_bytes(b"left from another run")
    note.write_text("no engine loads this")
    try:
        assert inspect_shards(made / "out").strays == (name,)
        with pytest.raises(ShardFolderError, match=f"holds {re.escape(name)}, which its manifest does not list"):
            inspect_shards(made / "out", verify=True)
    finally:
        stray.unlink()
        note.unlink()
    assert inspect_shards(made / "out", verify=True).strays == ()


def test_the_source_is_at_hand_only_while_it_is_the_same(made: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", make_config())
    shard_checkpoint(source, tmp_path / "out", 2, source_id=str(source))
    manifest = Manifest.load(tmp_path / "out")
    assert sources_at_hand(manifest) == [source]
    assert sources_at_hand(Manifest.load(made / "out")) == []
    (source / "model.safetensors").unlink()
    assert sources_at_hand(manifest) == []


@pytest.mark.parametrize("wheel", ["llm-tiny", "llm-tiny==0.1.2"])
def test_a_wheels_model_is_at_hand_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: str) -> None:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path))
    folder = pypi_entry(wheel)
    source = make_checkpoint(folder / "tiny", make_config())
    shard_checkpoint(source, tmp_path / "out", 2, source_id="pypi:llm-tiny", revision="0.1.2")
    manifest = Manifest.load(tmp_path / "out")
    for record in ("{", '{"folder": 3, "revision": "0.1.2"}', '{"folder": "tiny", "revision": "0.1.3"}'):
        (folder / "source.json").write_text(record)
        assert sources_at_hand(manifest) == []
    (folder / "source.json").write_text('{"folder": "tiny", "revision": "0.1.2"}')
    assert sources_at_hand(manifest) == [source]


def test_a_gguf_files_model_is_at_hand_while_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    source = make_checkpoint(converted_gguf(file), make_config())
    shard_checkpoint(source, tmp_path / "out", 2, source_id=str(file))
    manifest = Manifest.load(tmp_path / "out")
    assert sources_at_hand(manifest) == [source]
    os.utime(file, ns=(3, 3))
    assert sources_at_hand(manifest) == []
    file.unlink()
    assert sources_at_hand(manifest) == []
