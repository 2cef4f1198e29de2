"""The manifest: strict both ways, and cheap checks of the files it lists."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.errors import ShardFolderError
from tpctl.manifest import manifest as module
from tpctl.manifest.manifest import MANIFEST, Manifest, describe_ranks
from tpctl.manifest.records import Shard
from tpctl.partition.split import Rule
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder that no test changes."""
    folder = tmp_path_factory.mktemp("manifest")
    source = make_checkpoint(folder / "model", make_config("qwen2"), files=2)
    shard_checkpoint(source, folder / "out", 3, max_part_size=4000)
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A shard folder to damage."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_it_tells_what_the_loader_needs(made: Path) -> None:
    manifest = Manifest.load(made)
    assert manifest.tp_size == 3
    assert manifest.rank_files(2)[:2] == ["model-rank-2-part-0.safetensors", "model-rank-2-part-1.safetensors"]
    qkv = manifest.tensors(1)["model.layers.0.self_attn.qkv_proj.weight"]
    assert (qkv.rule, qkv.dtype, qkv.shape) == (Rule.QKV, "BF16", (18, 24))
    assert [piece.label for piece in qkv.pieces] == ["q", "k", "v"]
    manifest.check_files(made)


def test_text_is_canonical_and_readable_line_by_line(made: Path) -> None:
    text = (made / MANIFEST).read_text()
    assert Manifest.load(made).text() == text
    lines = [line for line in text.splitlines() if "model.layers.1.mlp.down_proj.weight" in line]
    assert len([line for line in lines if '"digest"' in line]) == 3


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_the_manifest_is_found(made: Path, data: st.DataObject, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    raw = bytearray((made / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path_factory.mktemp("flip")
    (folder / MANIFEST).write_bytes(raw)
    with pytest.raises(ShardFolderError, match=r"altered|damaged|format version"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"tp_size":3', '"tp_size":2'),
        ('"tp_size":3', '"tp_size": 3'),
        ('"tp_size":3,', '"tp_size":3,"tp_size":3,'),
        ('"tp_size":3,', ""),
        ('"rule":"row"', '"rule":"diagonal"'),
        ('"file":"model', '"file":"../model'),
    ],
)
def test_edits_are_found(copy: Path, old: str, new: str) -> None:
    text = (copy / MANIFEST).read_text()
    assert old in text
    (copy / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(ShardFolderError, match=r"was altered after it was written; shard the model again"):
        Manifest.load(copy)


TENSOR = "shards/0/tensors/model.layers.0.self_attn.qkv_proj.weight"


CRAFTED: dict[str, tuple[Any, ...]] = {
    "shards/0/parts/0/file": ("../../secret", "/secret", "a/b", ".", "..", "", "a\0b", 3, None),
    "source/files/0/name": ("../../secret", "/secret", "a/b", ".", "..", "", "a\0b", 3, None),
    "files": (*({name: {"size": 1, "digest": "0" * 64}} for name in ("../secret", "/secret", ".", "..", "")), 3, None),
    "tp_size": (0, -1, 2, 3.0, True, "3", None, []),
    "shards": ({"3": {"parts": [], "tensors": {}}}, {"x": {}}, {"-1": {"parts": [], "tensors": {}}}, [], None, 3),
    "shards/1/tensors": ({}, [], None),
    "shards/0/parts/0/size": (-1, 1, 1.5, True, "9", None),
    "shards/0/parts/0/header_size": (-1, 1.5, True, "9", 10**30, None),
    "shards/0/parts/0/header_sha256": ("", "0" * 63, "g" * 64, "0" * 65, 0, None),
    f"{TENSOR}/digest": ("", "0" * 63, "G" * 64, "0" * 64 + "\n", 0, None),
    f"{TENSOR}/part": (-1, 99, True, 0.0, None),
    f"{TENSOR}/dim": (-1, 2, True, None),
    f"{TENSOR}/fill": (-1, 2, True, None),
    f"{TENSOR}/dtype": (3, None, []),
    f"{TENSOR}/shape": ([-18, 24], [1, 24], [18, 24.0], [True, 24], [], 18, "ab", None),
    f"{TENSOR}/pieces": (None, 3, [3], [{}]),
    f"{TENSOR}/pieces/0/at": ([18, 0], [-1, 0], [0], [0, 1], [0, 0, 0], None),
    f"{TENSOR}/pieces/0/shape": ([19, 24], [1, 23], [1, 25], [24], None),
    f"{TENSOR}/pieces/0/start": ([-1, 0], [0], [0, False], "00"),
    f"{TENSOR}/pieces/0/source": (3, None),
    f"{TENSOR}/pieces/0/label": (3, None),
    "source": (3, None, {}),
    "source/id": (3, None),
    "source/revision": (3, []),
    "source/index": (3, {}),
    "source/aliases": (3, None, {"a": 3}),
    "source/files": (3, None, [3], [{}]),
    "source/files/0/size": (-1, True, None),
    "source/files/0/header": (3, None),
    "source/files/0/sha256": (3, "0" * 63),
    "files/config.json/size": (-1, True, None),
    "files/config.json/digest": ("0" * 63, 3, None),
    "max_part_size": (0, -1, True, None),
    "model_type": (3, None),
    "dtype": (3, []),
    "compat": (3, []),
    "extra": (3, [], {}),
}


@pytest.mark.parametrize(("place", "new"), [(place, new) for place, values in CRAFTED.items() for new in values])
def test_what_no_tpctl_writes_is_refused_even_with_a_right_digest(copy: Path, place: str, new: Any) -> None:
    value = json.loads((copy / MANIFEST).read_text())
    value.pop("sha256")
    *outer, last = place.split("/")
    held = value
    for key in outer:
        held = held[int(key) if isinstance(held, list) else key]
    held[last] = new
    digest = hashlib.sha256(module._text(value).encode()).hexdigest()
    (copy / MANIFEST).write_text(module._text({**value, "sha256": digest}))
    with pytest.raises(ShardFolderError, match=r"was altered after it was written; shard the model again") as caught:
        Manifest.load(copy)
    assert "\n" not in str(caught.value)


def test_the_way_of_crafting_is_sound(copy: Path) -> None:
    """What the test above writes is refused for its content, not for its form."""
    value = json.loads((copy / MANIFEST).read_text())
    value.pop("sha256")
    value["source"]["id"] = "other"
    digest = hashlib.sha256(module._text(value).encode()).hexdigest()
    (copy / MANIFEST).write_text(module._text({**value, "sha256": digest}))
    assert Manifest.load(copy).source.id == "other"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"format_version": "1"}', "[" * 10**5])
def test_nonsense_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ShardFolderError, match=r"altered|damaged") as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_half_a_character_is_one_line(copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"model_type":"', '"model_type":"\\ud800'))
    with pytest.raises(ShardFolderError, match="altered"):
        Manifest.load(copy)


def test_another_format_version_names_both(copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"format_version":1', '"format_version":7'))
    with pytest.raises(ShardFolderError, match="has format version 7, this tpctl reads version 1"):
        Manifest.load(copy)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardFolderError, match="is not a shard folder, make one with `tpctl shard`"):
        Manifest.load(tmp_path)
    with pytest.raises(ShardFolderError, match="there is no folder"):
        Manifest.load(tmp_path / "none")


def test_another_tp_names_both_and_the_next_step(made: Path) -> None:
    manifest = Manifest.load(made)
    manifest.check_tp(3, made)
    with pytest.raises(ShardFolderError, match=r"cut for tp 3, but tp 2 is asked for; .*tpctl reshard .* --tp 2"):
        manifest.check_tp(2, made)


def test_missing_truncated_and_exchanged_parts_are_found_without_hashing(copy: Path) -> None:
    manifest = Manifest.load(copy)
    part = copy / "model-rank-1-part-0.safetensors"
    whole = part.read_bytes()
    part.unlink()
    with pytest.raises(ShardFolderError, match=rf"part-0\.safetensors is missing \({len(whole)} bytes by"):
        manifest.check_files(copy)
    manifest.check_files(copy, [0, 2])
    part.write_bytes(whole[:-1])
    with pytest.raises(ShardFolderError, match=f"has {len(whole) - 1} bytes, but {len(whole)} by the manifest"):
        manifest.check_files(copy, [1])
    part.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    with pytest.raises(ShardFolderError, match="has another header than the manifest says"):
        manifest.check_files(copy)
    part.unlink()
    os.mkdir(part)  # noqa: PTH102
    with pytest.raises(ShardFolderError, match="cannot be read"):
        manifest.check_files(copy)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([], "ranks none"), ([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([5, 0, 2, 3], "ranks 0, 2-3, 5")],
)
def test_ranks_are_described_in_runs(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text


def test_a_manifest_of_other_tensors_is_refused_by_merge_and_reshard(copy: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(copy)
    out = tmp_path.with_name(f"{tmp_path.name}-out")
    file = manifest.source.files[0]
    renamed = replace(file, header=file.header.replace("q_proj", "Q_proj"))
    source = replace(manifest.source, files=(renamed, *manifest.source.files[1:]))
    (copy / MANIFEST).write_text(replace(manifest, source=source).text())
    with pytest.raises(ShardFolderError, match=r"contradicts itself: the checkpoint has no tensor .*q_proj\.\w+ "):
        merge_shards(copy, out)
    bare = {rank: Shard(shard.parts[:0], {}) for rank, shard in manifest.shards.items()}
    (copy / MANIFEST).write_text(replace(manifest, shards=bare).text())
    with pytest.raises(ShardFolderError, match="was altered"):
        reshard(copy, out, 2)
    assert not out.exists()
