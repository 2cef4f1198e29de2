"""Sharding checkpoints: the bytes, the files, and every way it can be refused or fail."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config, read_tensors
from tpctl.arch.blueprint import EMBEDDING, LM_HEAD
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.errors import (
    CheckpointError,
    OutputError,
    PartitionError,
    ShardFolderError,
    UnsupportedModelError,
    UsageError,
)
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving import transfer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(), files=2)


def expected(source: Path, rank: int, tp: int) -> dict[str, np.ndarray[Any, Any]]:
    """A rank's tensors, assembled with numpy from the checkpoint."""
    weights = read_tensors(source)
    plan = build_plan(ModelConfig.load(source), tp)
    found = {}
    for name, stored in plan.shards[rank].items():
        out = np.zeros(stored.shape, weights[stored.pieces[0].source].dtype if stored.pieces else "<u2")
        for piece in stored.pieces:
            window = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
            place = tuple(slice(a, a + n) for a, n in zip(piece.at, piece.shape, strict=True))
            out[place] = weights[piece.source][window]
        found[name] = out
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_every_family_at_even_and_uneven_sizes(tmp_path: Path, family: str, tp: int) -> None:
    source = make_checkpoint(tmp_path / "model", make_config(family), files=2)
    out = tmp_path / "out"
    report = shard_checkpoint(source, out, tp)
    assert set(report.bytes_per_rank) == set(range(tp))
    for rank in range(tp):
        loaded = load_file(out / f"model-rank-{rank}-part-0.safetensors")
        wanted = expected(source, rank, tp)
        assert loaded.keys() == wanted.keys()
        for name, tensor in loaded.items():
            assert tensor.dtype == torch.bfloat16
            np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), wanted[name], err_msg=name)


def test_files_are_byte_for_byte_what_the_reference_writer_makes(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "out", 2)
    path = tmp_path / "out" / "model-rank-1-part-0.safetensors"
    save_file(load_file(path), tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_the_folder_holds_the_models_small_files_and_nothing_stale(tmp_path: Path, source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    shard_checkpoint(source, tmp_path / "out", 2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "model-rank-0-part-0.safetensors",
        "model-rank-1-part-0.safetensors",
        "tokenizer.json",
        "tpctl.json",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_bands_of_one_row_give_the_same_bytes(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_checkpoint(source, tmp_path / "one", 3)
    monkeypatch.setattr(transfer, "BAND_BYTES", 1)
    shard_checkpoint(source, tmp_path / "other", 3)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "other")


def test_parts_are_split_at_the_size_and_on_every_rank_alike(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "out", 3, max_part_size=3000)
    manifest = Manifest.load(tmp_path / "out")
    assert len({tuple(t.part for t in manifest.tensors(rank).values()) for rank in range(3)}) == 1
    assert len(manifest.rank_files(0)) > 3
    for rank in range(3):
        for index, name in enumerate(manifest.rank_files(rank)):
            header = read_header(tmp_path / "out" / name)
            held = [n for n, t in manifest.tensors(rank).items() if t.part == index]
            assert header.tensors.keys() == set(held)
            assert header.file_size - header.size <= 3000 or len(held) == 1


def test_some_ranks_are_the_same_files_as_in_a_whole_run(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "all", 4, max_part_size=3000)
    shard_checkpoint(source, tmp_path / "some", 4, ranks=[3, 1], max_part_size=3000)
    whole, some = folder_bytes(tmp_path / "all"), folder_bytes(tmp_path / "some")
    wanted = {n: b for n, b in whole.items() if not n.startswith(("model-rank-0", "model-rank-2"))}
    assert some.keys() == wanted.keys()
    assert {n: b for n, b in some.items() if n != "tpctl.json"} == {
        n: b for n, b in wanted.items() if n != "tpctl.json"
    }
    manifest = Manifest.load(tmp_path / "some")
    assert sorted(manifest.shards) == [1, 3]
    with pytest.raises(ShardFolderError, match="no shard of rank 0: it has ranks 1, 3 of tp 4"):
        manifest.rank_files(0)
    with pytest.raises(PartitionError, match="rank 4 does not exist at tp 4; ranks are 0 to 3"):
        shard_checkpoint(source, tmp_path / "none", 4, ranks=[4])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_casts_on_the_way_are_torchs(tmp_path: Path, dtype: str, stored: str) -> None:
    source = make_checkpoint(tmp_path / "model", make_config(), dtype=stored)
    plain = shard_checkpoint(source, tmp_path / "plain", 3)
    report = shard_checkpoint(source, tmp_path / "cast", 3, dtype=dtype, allow_overflow=True)
    target = getattr(torch, dtype)
    same = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[stored] == target
    assert plain.dtype is None
    assert (report.dtype is None) == same
    if same:
        assert folder_bytes(tmp_path / "plain") == folder_bytes(tmp_path / "cast")
    for rank in range(3):
        name = f"model-rank-{rank}-part-0.safetensors"
        before, after = load_file(tmp_path / "plain" / name), load_file(tmp_path / "cast" / name)
        for key, tensor in before.items():
            wanted = tensor.to(target)
            assert after[key].dtype == target
            assert torch.equal(after[key].isnan(), wanted.isnan())
            assert torch.equal(after[key].nan_to_num(0), wanted.nan_to_num(0)), key


def test_integers_are_not_cast(tmp_path: Path) -> None:
    table = TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", "I64", (3,))
    source = make_checkpoint(tmp_path / "model", make_config(), extra=[table])
    shard_checkpoint(source, tmp_path / "out", 2, dtype="float32")
    extra = Manifest.load(tmp_path / "out").extra
    assert extra is not None
    assert extra.tensors[table.name].dtype == "I64"


@pytest.mark.parametrize("name", [EMBEDDING, LM_HEAD])
def test_tied_checkpoints_store_the_one_copy_under_either_name(tmp_path: Path, name: str) -> None:
    config = make_config(tie_word_embeddings=True)
    source = make_checkpoint(tmp_path / "model", config, tied_name=name)
    shard_checkpoint(source, tmp_path / "out", 2)
    table = read_tensors(source)[name]
    shards = [load_file(tmp_path / "out" / f"model-rank-{r}-part-0.safetensors") for r in (0, 1)]
    joined = torch.cat([shard[LM_HEAD] for shard in shards]).view(torch.uint16).numpy()
    assert all(EMBEDDING not in shard for shard in shards)
    np.testing.assert_array_equal(joined[:70], table)
    assert not joined[70:].any()


def _tied_twice(tmp_path: Path, *, equal: bool) -> Path:
    config = make_config(tie_word_embeddings=True)
    source = make_checkpoint(tmp_path / "model", config, extra=[TensorSpec(LM_HEAD, "BF16", (70, 24))])
    path = source / "model.safetensors"
    header, data = read_header(path), bytearray(path.read_bytes())
    head, embedding = header.tensors[LM_HEAD], header.tensors[EMBEDDING]
    data[head.start : head.stop] = data[embedding.start : embedding.stop]
    if not equal:
        data[head.stop - 1] ^= 1
    path.write_bytes(data)
    return source


def test_a_tied_head_stored_twice_is_stored_once_if_it_is_equal(tmp_path: Path) -> None:
    source = _tied_twice(tmp_path, equal=True)
    shard_checkpoint(source, tmp_path / "out", 2)
    assert Manifest.load(tmp_path / "out").source.aliases == {LM_HEAD: EMBEDDING}


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    source = _tied_twice(tmp_path, equal=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight; set tie"):
        shard_checkpoint(source, tmp_path / "out", 2)


def test_errors_come_before_anything_is_written(tmp_path: Path, source: Path) -> None:
    with pytest.raises(PartitionError, match="size 5 does not fit 4 query heads; use --tp 1 to 4"):
        shard_checkpoint(source, tmp_path / "out", 5)
    with pytest.raises(UsageError, match="dtype 'float8' is unknown"):
        shard_checkpoint(source, tmp_path / "out", 2, dtype="float8")
    (source / "config.json").write_text(json.dumps(make_config(intermediate_size=41)))
    with pytest.raises(CheckpointError, match="40 x 24 in the checkpoint but 41 x 24 by config"):
        shard_checkpoint(source, tmp_path / "out", 2)
    (source / "config.json").write_text(json.dumps({**make_config(), "model_type": "bloom"}))
    with pytest.raises(UnsupportedModelError, match='"bloom" is not supported'):
        shard_checkpoint(source, tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_truncated_source_is_refused_before_anything_is_written(tmp_path: Path, source: Path) -> None:
    path = source / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is truncated"):
        shard_checkpoint(source, tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_shard_folder_is_no_source(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "out", 2)
    with pytest.raises(
        ShardFolderError, match=r"is cut into shards already; use `tpctl reshard .*out --tp 4 -o FOLDER`"
    ):
        shard_checkpoint(tmp_path / "out", tmp_path / "again", 4)


def test_an_existing_target_is_replaced_only_with_force(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    shard_checkpoint(source, out, 2)
    before = folder_bytes(out)
    with pytest.raises(OutputError, match="exists already; use --force"):
        shard_checkpoint(source, out, 4)
    assert folder_bytes(out) == before
    shard_checkpoint(source, out, 4, force=True)
    assert Manifest.load(out).tp_size == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_force_replaces_neither_the_source_nor_what_is_no_model(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; choose another folder"):
        shard_checkpoint(source, tmp_path / "file", 2, force=True)
    before = folder_bytes(source)
    with pytest.raises(OutputError, match=r"holds the source .* itself"):
        shard_checkpoint(source, source, 2, force=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"holds the source .* itself"):
        shard_checkpoint(source, tmp_path / "link", 2, force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds no model, and --force replaces nothing else"):
        shard_checkpoint(source, tmp_path / "home", 2, force=True)
    assert folder_bytes(source) == before
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    shard_checkpoint(source, tmp_path / "empty", 2, force=True)
    (tmp_path / "alias").symlink_to("empty")
    shard_checkpoint(source, tmp_path / "alias", 3, force=True)
    assert (tmp_path / "alias").is_symlink()
    assert Manifest.load(tmp_path / "empty").tp_size == 3


def test_progress_ends_at_the_total(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[int, int]] = []
    shard_checkpoint(source, tmp_path / "out", 3, progress=lambda done, total, what="": seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_where_it_was_made_leaves_no_trace(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "one", 2, source_id="org/model", revision="abc")
    shutil.copytree(source, tmp_path / "elsewhere")
    shard_checkpoint(tmp_path / "elsewhere", tmp_path / "two", 2, source_id="org/model", revision="abc")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    manifest = Manifest.load(tmp_path / "one")
    assert (manifest.source.id, manifest.source.revision) == ("org/model", "abc")
