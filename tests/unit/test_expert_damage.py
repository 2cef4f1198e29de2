"""A flipped bit in a mixture's weights, scales or manifest is found and named: tensor, rank, expert and place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.damaging import damaged, named, replaced
from tests.unit.expert_config import CONFIG
from tests.unit.synthetic import make_checkpoint
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.safetensors import read_header
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

EXPERTS = "model.layers.0.mlp.experts"
CUTS = {"within": (3, Cutting()), "copies": (4, Cutting(even=True)), "dealt": (3, Cutting(3)), "both": (4, Cutting(2))}
"""Experts cut at the ends of blocks, scales on both sides of a border, whole experts by rank, and by pairs of ranks."""


@pytest.fixture(scope="module", params=CUTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint ``model`` of FP8 experts and its shards ``out``; tests put back what they change."""
    folder = tmp_path_factory.mktemp("experts")
    model = make_checkpoint(folder / "model", CONFIG, files=2)
    tp_size, cutting = CUTS[request.param]
    shard_checkpoint(model, folder / "out", tp_size, cutting=cutting)
    return folder


def flipped(path: Path, place: int, bit: int, **options: Any) -> str:
    """The message of verifying the folder of ``path`` while that bit of it is flipped."""
    raw = path.read_bytes()
    path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
    try:
        with pytest.raises(ShardFolderError) as caught:
            inspect_shards(path.parent, verify=True, **options)
    finally:
        path.write_bytes(raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_a_weight_or_scale_is_placed(made: Path, data: st.DataObject) -> None:
    manifest = Manifest.load(made / "out")
    rank = data.draw(st.integers(0, manifest.tp_size - 1))
    path = made / "out" / manifest.rank_files(rank)[0]
    tensors = read_header(path).tensors
    name = data.draw(st.sampled_from([name for name in tensors if ".experts." in name]))
    info, held = tensors[name], manifest.tensors(rank)[name]
    byte = data.draw(st.integers(0, info.nbytes - 1))
    bit = data.draw(st.integers(0, 7))
    alone = flipped(path, info.start + byte, bit)
    assert f"{name} of rank {rank} is damaged" in alone
    with_source = flipped(path, info.start + byte, bit, source=made / "model")
    _, rows, columns = info.shape
    expert, inside = divmod(byte // (info.nbytes // (info.shape[0] * rows * columns)), rows * columns)
    row, column = divmod(inside, columns)
    along = (row, column)[held.dim - 1]
    piece = next(p for p in held.pieces if p.at[held.dim] <= along < p.at[held.dim] + p.shape[held.dim])
    source = piece.source.format(piece.start[0] + expert)
    row, column = row - piece.at[1] + piece.start[1], column - piece.at[2] + piece.start[2]
    start = f"{name} of rank {rank} is damaged"
    said = f"{start} at row {row}, column {column} of its source {source}{alone.removeprefix(start)}"
    assert with_source == said


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_files_is_found(made: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted((made / "out").glob("model-rank-*"))))
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    message = flipped(path, place, data.draw(st.integers(0, 7)))
    inside = [name for name, info in read_header(path).tensors.items() if info.start <= place < info.stop]
    assert all(name in message for name in inside) and f"rank {path.name.split('-')[2]}" in message


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_the_manifest_is_found_and_named(made: Path, data: st.DataObject) -> None:
    out = made / "out"
    raw = (out / MANIFEST).read_bytes()
    lines = [(found.start(), found.end()) for found in re.finditer(rb"[^\n]*\n", raw)]
    fields = [line for line in lines if re.match(rb' "(expert_parallel|even)"', raw[slice(*line)])]
    stacked = [line for line in lines if b'"stacked":true' in raw[slice(*line)]]
    first, stop = data.draw(
        st.sampled_from(data.draw(st.sampled_from([one for one in (lines, fields, stacked) if one])))
    )
    place, bit = data.draw(st.integers(first, stop - 1)), data.draw(st.integers(0, 7))
    message = damaged(out, raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
    for word in named(raw, place):
        assert word in message, (raw[place - 30 : place + 30], message)
    assert re.search(r"written: \S", message), message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"start":[0,0,0],"shape":[6,', '"start":[3,0,0],"shape":[6,', f"the pieces of {EXPERTS}.w13_weight of rank 0"),
        ('"start":[0,0,0],"shape":[6,', '"start":[0,0,0],"shape":[2,', f"{EXPERTS}.w13_weight of rank 0 is malformed"),
        (',"stacked":true', "", f"the stack of {EXPERTS}.w13_weight of rank 0 does not fit"),
    ],
)
def test_edits_of_a_stacked_tensor_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    shard_checkpoint(make_checkpoint(tmp_path / "model", CONFIG), tmp_path / "out", 2)
    raw = (tmp_path / "out" / MANIFEST).read_bytes()
    assert said in damaged(tmp_path / "out", replaced(raw, old, new, f'"{EXPERTS}.w13_weight":{{'))


def test_one_expert_of_another_is_found(tmp_path: Path) -> None:
    """Two experts that a rank has in each other's place: digests that were forged too do not help."""
    model = make_checkpoint(tmp_path / "model", CONFIG)
    shard_checkpoint(model, tmp_path / "out", 2, cutting=Cutting(2))
    path = tmp_path / "out" / "model-rank-1-part-0.safetensors"
    info, raw = read_header(path).tensors[f"{EXPERTS}.w2_weight"], path.read_bytes()
    size = info.nbytes // info.shape[0]
    data = raw[info.start : info.stop]
    data = data[size : 2 * size] + data[:size] + data[2 * size :]
    path.write_bytes(raw[: info.start] + data + raw[info.stop :])
    with pytest.raises(ShardFolderError, match=r"w2_weight of rank 1 differs .*experts\.3\.down_proj\.weight at"):
        inspect_shards(tmp_path / "out", source=model)
    value = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert value["expert_parallel"] == 2
