"""merge(shard(x)) is x and reshard(shard(x, N), M) is shard(x, M), byte for byte, for every family."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.bad_input import local_answer
from tests.unit.synthetic import RUN, folder_bytes, make_checkpoint, make_config, read_tensors
from tpctl.arch.blueprint import EMBEDDING, LM_HEAD
from tpctl.arch.config import Cutting
from tpctl.checkpoint.cast import cast
from tpctl.checkpoint.folder import INDEX
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.errors import OutputError, PartitionError, ShardFolderError
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.cutting.writer import _Writer


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    """A small checkpoint of any family whose head count allows tensor-parallel sizes up to 8."""
    kv = draw(st.sampled_from([1, 2, 3, 4, 8]))
    group = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8) if kv * g >= 8 and kv * g <= 12]))
    tied = draw(st.booleans())
    return {
        "config": make_config(
            draw(st.sampled_from(RUN)),
            hidden_size=draw(st.integers(1, 12)),
            num_hidden_layers=draw(st.integers(1, 2)),
            num_attention_heads=kv * group,
            num_key_value_heads=kv,
            head_dim=2 * draw(st.integers(1, 2)),
            intermediate_size=draw(st.integers(8, 70)),
            vocab_size=draw(st.integers(1, 150)),
            tie_word_embeddings=tied,
            attention_bias=draw(st.booleans()),
            mlp_bias=draw(st.booleans()),
        ),
        "files": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(["BF16", "F32"])),
        "tied_name": draw(st.sampled_from([EMBEDDING, LM_HEAD])),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    options=checkpoints(),
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    part=st.sampled_from([500, 4000, 10**9]),
)
def test_round_trips(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], n: int, m: int, part: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    config = options.pop("config")
    source = make_checkpoint(folder / "model", config, **options)
    shard_checkpoint(source, folder / "n", n, max_part_size=part)
    merge_shards(folder / "n", folder / "merged")
    assert folder_bytes(folder / "merged") == folder_bytes(source)
    reshard(folder / "n", folder / "n-to-m", m)
    shard_checkpoint(source, folder / "m", m, max_part_size=part)
    assert folder_bytes(folder / "n-to-m") == folder_bytes(folder / "m")
    shutil.rmtree(folder)


@pytest.mark.daily(4)
@pytest.mark.parametrize("family", RUN)
def test_every_family_between_all_sizes(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """From 1 to 8 ranks to 1 to 8: 9 query and 3 KV heads are uneven at 2 and from 4 on, where KV heads are shared.

    From each size a family is cut anew into two others, all families together from each into each; all of a family
    with ``--whole-grid``.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # thousands of files, of which none need survive a power cut
    config = make_config(
        family,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
        intermediate_size=50,
        tie_word_embeddings=family in ("llama", "qwen3"),
    )
    source = make_checkpoint(tmp_path / "model", config, files=2)
    wanted = {}
    for n in range(1, 9):
        shard_checkpoint(source, tmp_path / f"{n}", n, max_part_size=4000)
        wanted[n] = folder_bytes(tmp_path / f"{n}")
        merge_shards(tmp_path / f"{n}", tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(source), n
    steps = {RUN.index(family) % 8, (RUN.index(family) + 3) % 8}
    if pytestconfig.getoption("--whole-grid"):
        steps = set(range(8))
    for n in range(1, 9):
        for m in ((n - 1 + step) % 8 + 1 for step in steps):
            reshard(tmp_path / f"{n}", tmp_path / "out", m, force=True)
            assert folder_bytes(tmp_path / "out") == wanted[m], (n, m)


def test_line_ends_of_an_index_come_back(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", make_config(), files=2)
    raw = (source / INDEX).read_bytes().replace(b"\n", b"\r\n")
    (source / INDEX).write_bytes(raw[:-2] + b"\r")
    shard_checkpoint(source, tmp_path / "n", 2)
    merge_shards(tmp_path / "n", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(), files=2)


def test_tensors_that_no_rank_needs_come_back_too(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    table = TensorSpec("model.layers.1.self_attn.rotary_emb.inv_freq", "F32", (3,))
    head = TensorSpec(LM_HEAD, "BF16", (70, 24))
    source = make_checkpoint(tmp_path / "model", config, extra=[table, head])
    path = source / "model.safetensors"
    header, data = read_header(path), bytearray(path.read_bytes())
    one, other = header.tensors[LM_HEAD], header.tensors[EMBEDDING]
    data[one.start : one.stop] = data[other.start : other.stop]
    path.write_bytes(data)
    shard_checkpoint(source, tmp_path / "n", 3)
    merge_shards(tmp_path / "n", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
    reshard(tmp_path / "n", tmp_path / "four", 4)
    merge_shards(tmp_path / "four", tmp_path / "merged", force=True)
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


def test_metadata_and_an_odd_layout_of_the_source_come_back(tmp_path: Path) -> None:
    import json
    import struct

    source = make_checkpoint(tmp_path / "model", make_config())
    path = source / "model.safetensors"
    header, data = read_header(path), path.read_bytes()
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "made by": "hand ✓"}}
    body, offset = b"", 0
    for info in sorted(header.tensors.values(), key=lambda info: info.name[::-1]):
        entries[info.name] = {
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
            "dtype": info.dtype,
        }
        body, offset = body + data[info.start : info.stop], offset + info.nbytes
    text = json.dumps(entries, indent=3).encode() + b"   \n"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    shard_checkpoint(source, tmp_path / "n", 2)
    merge_shards(tmp_path / "n", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


def test_cast_shards_give_the_cast_checkpoint(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 3, dtype="float32")
    report = merge_shards(tmp_path / "n", tmp_path / "merged")
    assert not report.exact
    before, after = read_tensors(source), read_tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, values in before.items():
        wanted = cast(values.view("u1"), "BF16", "F32")
        assert after[name].tobytes() == wanted.tobytes(), name
    total = sum(values.nbytes for values in after.values())
    assert f'"total_size": {total}' in (tmp_path / "merged" / INDEX).read_text()


def test_damage_is_found_on_the_way_and_nothing_is_published(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 3)
    path = tmp_path / "n" / "model-rank-2-part-0.safetensors"
    info = read_header(path).tensors["model.layers.1.mlp.down_proj.weight"]
    raw = bytearray(path.read_bytes())
    raw[info.start] ^= 1
    path.write_bytes(raw)
    for run in (
        lambda: merge_shards(tmp_path / "n", tmp_path / "out"),
        lambda: reshard(tmp_path / "n", tmp_path / "out", 2),
    ):
        with pytest.raises(ShardFolderError, match=r"1\.mlp\.down_proj\.weight of rank 2 is damaged"):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "n"]


def test_damaged_vocabulary_padding_is_found(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 2)
    path = tmp_path / "n" / "model-rank-1-part-0.safetensors"
    info = read_header(path).tensors[LM_HEAD]
    raw = bytearray(path.read_bytes())
    raw[info.stop - 1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ShardFolderError, match=r"lm_head\.weight of rank 1 is damaged"):
        merge_shards(tmp_path / "n", tmp_path / "out")


def test_an_altered_copied_file_is_found(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 2)
    (tmp_path / "n" / "config.json").write_text("{}")
    with pytest.raises(ShardFolderError, match=r"config\.json was altered"):
        merge_shards(tmp_path / "n", tmp_path / "out")
    with pytest.raises(ShardFolderError, match=r"config\.json was altered"):
        reshard(tmp_path / "n", tmp_path / "out", 3)


def test_every_rank_is_needed(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 4, ranks=[0, 3])
    message = "holds ranks 0, 3 of tp 4, but all are needed; add ranks 1-2: `tpctl shard MODEL --tp 4 --ranks 1-2 -o"
    with pytest.raises(ShardFolderError, match=message):
        merge_shards(tmp_path / "n", tmp_path / "out")
    with pytest.raises(ShardFolderError, match=message):
        reshard(tmp_path / "n", tmp_path / "out", 2)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({"dtype": "float32"}, " --dtype float32"),
        ({"max_part_size": 4000}, " --max-part-size 4000B"),
        ({"compat": "vllm", "cutting": Cutting(even=True)}, " --compat vllm --even"),
    ],
)
def test_the_command_for_the_other_ranks_has_the_options_of_those_that_are_there(
    tmp_path: Path, source: Path, how: dict[str, Any], options: str
) -> None:
    folder = tmp_path / "n"
    shard_checkpoint(source, folder, 2, ranks=[0], **how)
    with pytest.raises(ShardFolderError) as caught:
        merge_shards(folder, tmp_path / "out")
    command = f"shard MODEL --tp 2{options} --ranks 1 -o {folder}"
    assert f"add rank 1: `tpctl {command}`" in str(caught.value)
    assert local_answer(command.replace("MODEL", str(source)), tmp_path).code == 0
    assert merge_shards(folder, tmp_path / "out").exact is ("dtype" not in how)


def test_reshard_refuses_too_many_ranks_and_an_existing_target(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 2)
    with pytest.raises(PartitionError, match="size 5 does not fit 4 query heads"):
        reshard(tmp_path / "n", tmp_path / "out", 5)
    with pytest.raises(OutputError, match="exists already"):
        reshard(tmp_path / "n", tmp_path / "model", 4)
    with pytest.raises(OutputError, match="exists already"):
        merge_shards(tmp_path / "n", tmp_path / "model")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("model/two", "two is .*two itself, which is read"),
        ("link", "link is .*two itself, which is read"),
        ("model/two/below", "below is inside .*two, which is read"),
        ("link/below", "below is inside .*two, which is read"),
        ("model", "model holds the source .*two itself"),
        ("linked-model", "linked-model holds the source .*two itself"),
    ],
)
def test_what_is_read_is_not_written_to(tmp_path: Path, source: Path, place: str, said: str, force: bool) -> None:
    shards = source / "two"
    shard_checkpoint(source, shards, 2)
    (tmp_path / "link").symlink_to(shards)
    (tmp_path / "linked-model").symlink_to(source)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for run in (
        lambda: merge_shards(shards, tmp_path / place, force=force),
        lambda: reshard(shards, tmp_path / place, 3, force=force),
        lambda: reshard(shards, tmp_path / place, 3, ranks=[0], force=force),
    ):
        with pytest.raises(OutputError, match=f"{said}; choose another folder"):
            run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_copied_file_that_changes_meanwhile_is_noticed(tmp_path: Path, source: Path, name: str) -> None:
    shard_checkpoint(source, tmp_path / "n", 2)
    path = tmp_path / "n" / name
    whole = path.read_bytes()

    def change(done: int, total: int, what: str = "") -> None:
        path.write_bytes(whole[:-1] + b" ")

    with pytest.raises(ShardFolderError, match=rf"{name} was altered after it was copied"):
        merge_shards(tmp_path / "n", tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_reshard_notices_a_copied_file_that_changes_after_it_was_checked(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_checkpoint(source, tmp_path / "n", 2)
    real = _Writer.prepare

    def change(self: _Writer) -> None:
        (tmp_path / "n" / "tokenizer.json").write_text("{}")
        real(self)

    monkeypatch.setattr(_Writer, "prepare", change)
    with pytest.raises(ShardFolderError, match=r"tokenizer\.json was altered after it was copied"):
        reshard(tmp_path / "n", tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


def test_options_of_reshard(tmp_path: Path, source: Path) -> None:
    shard_checkpoint(source, tmp_path / "n", 3)
    reshard(tmp_path / "n", tmp_path / "one", 4, max_part_size=3000, ranks=[2], compat="vllm")
    shard_checkpoint(source, tmp_path / "two", 4, max_part_size=3000, ranks=[2], compat="vllm")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
