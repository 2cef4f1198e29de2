"""Quantised models in the cache, and `tpctl shard --quantize`."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from tests.unit.bad_input import local_answer
from tests.unit.quantising_folders import HIDDEN, LAYER, dense, write
from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config, source_shapes
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.safetensors import TensorSpec
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.cli import shard as shard_command
from tpctl.errors import CheckpointError, ShardFolderError, SourceError
from tpctl.manifest.manifest import Manifest
from tpctl.quantizing import cache as cache_module
from tpctl.quantizing.cache import ensure_quantised
from tpctl.quantizing.schemes import Method
from tpctl.quantizing.writer import QuantizationReport, TensorLoss


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> ResolvedSource:
    """A Llama whose linears can be cut in two between blocks and groups."""
    config = make_config(
        hidden_size=512, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128
    )
    specs = [TensorSpec(name, "BF16", shape) for name, shape in source_shapes(config).items()]
    return ResolvedSource(write(tmp_path / "model", specs, config=config), "org/tiny", "abc")


def test_a_second_run_finds_it(source: ResolvedSource, cache: Path) -> None:
    told: list[str] = []
    made = ensure_quantised(source, Method.FP8, notify=told.append)
    again = ensure_quantised(source, Method.FP8, notify=told.append)
    assert told == ["quantising org/tiny to fp8 (once)"]
    assert made == again
    assert made.source.id == "org/tiny (fp8 by tpctl)"
    assert made.source.revision == "abc"
    assert made.source.folder.name == "tiny-fp8"
    assert made.source.folder.is_relative_to(cache / "models")
    assert {one.name for one in made.report.tensors} < source_names(source)
    other = ensure_quantised(source, Method.INT4, notify=told.append)
    assert other.source.folder != made.source.folder
    assert len(told) == 2


def source_names(source: ResolvedSource) -> set[str]:
    return set(CheckpointFolder.open(source.folder).tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_that_changed_is_quantised_again(source: ResolvedSource, name: str) -> None:
    told: list[str] = []
    first = ensure_quantised(source, Method.FP8, notify=told.append).source.folder
    os.utime(source.folder / name, ns=(1, 1))
    assert ensure_quantised(source, Method.FP8, notify=told.append).source.folder != first
    assert len(told) == 2


def test_nothing_is_left_of_a_run_that_failed(source: ResolvedSource, cache: Path) -> None:
    file, info = CheckpointFolder.open(source.folder).tensors[LAYER + "mlp.up_proj.weight"]
    data = bytearray(file.path.read_bytes())
    data[info.start : info.start + 2] = b"\x80\x7f"
    file.path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds NaN or infinity"):
        ensure_quantised(source, Method.FP8, notify=lambda text: None)
    assert list((cache / "models").iterdir()) == []


def test_a_source_that_changes_meanwhile_is_refused(
    source: ResolvedSource, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(done: int, total: int, what: str = "") -> None:
        os.utime(source.folder / "model.safetensors", ns=(done, done))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        ensure_quantised(source, Method.FP8, progress=progress, notify=lambda text: None)
    assert list((cache / "models").iterdir()) == []


def _quantise(folder: Path, notes: Path) -> None:
    def note(text: str) -> None:
        with notes.open("a") as file:
            file.write(f"{text}\n")

    ensure_quantised(ResolvedSource(folder, "org/tiny", "abc"), Method.FP8, notify=note)


def test_rows_that_end_within_a_block_are_told_of(tmp_path: Path) -> None:
    specs = [one for one in dense() if "mlp" not in one.name]
    specs.append(TensorSpec(LAYER + "mlp.down_proj.weight", "BF16", (HIDDEN, 200)))
    source = ResolvedSource(write(tmp_path / "odd", specs), "odd", None)
    told: list[str] = []
    for _ in range(2):
        ensure_quantised(source, Method.FP8_BLOCK, notify=told.append)
    assert told[0] == told[2]
    assert told[0].startswith(f"{LAYER}mlp.down_proj.weight has 200 columns, which blocks of 128 do not divide")
    assert told[1] == "quantising odd to fp8-block (once)"
    ensure_quantised(source, Method.FP8, notify=told.append)
    assert told[3:] == ["quantising odd to fp8 (once)"]


def test_two_that_ask_at_once_make_it_once(source: ResolvedSource, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_quantise, args=(source.folder, tmp_path / "notes")) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert (tmp_path / "notes").read_text() == "quantising org/tiny to fp8 (once)\n"


def test_shards_are_refused(source: ResolvedSource) -> None:
    (source.folder / "tpctl.json").write_text("{}")
    with pytest.raises(ShardFolderError, match=r"cut into shards already; quantise the model itself: `tpctl shard M"):
        ensure_quantised(source, Method.FP8)


def test_a_newer_way_is_not_served_from_the_cache(source: ResolvedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_quantised(source, Method.FP8, notify=lambda text: None).source.folder
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    assert ensure_quantised(source, Method.FP8, notify=lambda text: None).source.folder != first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--quantize fp8 --dtype float16", "--quantize fp8 keeps the dtype of all that it does not quantise"),
        ("--quantize int3", "'--quantize': 'int3' is not one of 'fp8', 'fp8-block', 'int4'"),
    ],
)
def test_usage_errors(source: ResolvedSource, cache: Path, options: str, said: str) -> None:
    answer = local_answer(f"shard model --tp 2 {options}", source.folder.parent)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert not cache.exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("shard quantised --tp 2 --quantize int4", "the model is quantised already (quantization_config in its con"),
        ("plan quantised --quantize int4", "the model is quantised already (quantization_config in its config.json); "),
        ("shard odd --tp 2 --quantize int4", "which groups of 128 do not divide"),
        ("plan odd --quantize int4", "which groups of 128 do not divide"),
        ("shard shards --tp 2 --quantize fp8", "shards is cut into shards already; quantise the model itself"),
    ],
)
def test_what_is_wrong_with_a_model_is_no_usage_error(source: ResolvedSource, command: str, said: str) -> None:
    place = source.folder.parent
    made = ensure_quantised(source, Method.FP8, notify=lambda text: None).source.folder
    shutil.copytree(made, place / "quantised")
    make_checkpoint(place / "odd", make_config(hidden_size=96))
    assert local_answer("shard model --tp 2 -o shards", place).code == 0
    answer = local_answer(command, place)
    assert (answer.code, answer.out) == (1, "") and said in answer.err


def test_an_output_that_exists_is_refused_before_the_work(source: ResolvedSource, cache: Path) -> None:
    (source.folder.parent / "model-fp8-tp2").mkdir()
    answer = local_answer("shard ./model --tp 2 --quantize fp8", source.folder.parent)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("tpctl: model-fp8-tp2 exists already; use --force")
    assert not cache.exists()


def test_losses_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = tuple(TensorLoss(f"w{i}", (8, 8), i / 100, i / 1000) for i in range(1, 8))
    shard_command.print_losses(QuantizationReport("fp8", 2_000_000, 1_100_000, tensors))
    assert capsys.readouterr().out == (
        "7 weights quantised to fp8: 2.0 MB before, 1.1 MB after\n"
        "  relative error    largest\n"
        "          4.000%      0.004  median\n"
        "          7.000%      0.007  w7\n"
        "          6.000%      0.006  w6\n"
        "          5.000%      0.005  w5\n"
        "          4.000%      0.004  w4\n"
        "          3.000%      0.003  w3\n"
    )


@pytest.mark.parametrize("method", Method)
def test_there_and_back_again(source: ResolvedSource, method: Method) -> None:
    """`shard --quantize`, and `merge` gives the quantised folder, byte for byte."""
    place = source.folder.parent
    answer = local_answer(f"shard ./model --tp 2 --quantize {method} --json", place)
    assert (answer.code, answer.err) == (0, f"quantising ./model to {method} (once)\n")
    report = json.loads(answer.out)
    with contextlib.chdir(place):
        named = ResolvedSource(Path("model"), "./model", None)
        made = ensure_quantised(named, method, notify=lambda text: pytest.fail("it is in the cache"))
    assert report["quantization"]["bytes_after"] == made.report.bytes_after
    assert len(report["quantization"]["tensors"]) == 14
    assert Manifest.load(place / f"model-{method}-tp2").source.id == f"./model ({method} by tpctl)"
    proved = json.loads(local_answer(f"inspect-shards model-{method}-tp2 --verify --json", place).out)["verified"]
    assert proved["compared_bytes"] == proved["hashed_bytes"]  # its source is found in the cache
    assert local_answer(f"merge model-{method}-tp2 -o merged", place).code == 0
    assert folder_bytes(place / "merged") == folder_bytes(made.source.folder)


def test_shards_of_a_quantised_model_are_held_against_the_original(source: ResolvedSource, cache: Path) -> None:
    place, report = source.folder.parent, json.loads
    assert local_answer("shard ./model --tp 2 --quantize fp8 -o out", place).code == 0
    shutil.rmtree(cache)
    told = local_answer("inspect-shards out --verify", place)
    assert told.code == 0 and "; --source MODEL compares every element with it, and the original quantised" in told.err
    said = "the shards were quantised before they were cut, so they are compared with ./model (fp8 by tpctl)\n"
    proved = local_answer("inspect-shards out --verify --source ./model --json", place)
    assert (proved.code, proved.err) == (0, f"quantising ./model to fp8 (once)\n{said}")
    found = report(proved.out)["verified"]
    assert found["compared_bytes"] == found["hashed_bytes"] > 0
    again = local_answer(f"inspect-shards out --source {found['source']} --json", place)  # quantised as it is
    assert (again.code, again.err) == (0, "") and report(again.out)["verified"]["compared_bytes"]
    path = source.folder / "model.safetensors"  # of another model, whose header is the same
    data = bytearray(path.read_bytes())
    data[-40:] = bytes(40)
    path.write_bytes(data)
    other = local_answer("inspect-shards out --verify --source ./model", place)
    assert other.code == 1 and " differs from its source " in other.err
    assert local_answer("merge out -o merged", place).code == 0
    assert local_answer("shard ./merged --tp 2 -o theirs", place).code == 0  # which somebody else quantised
    unlike = local_answer("inspect-shards theirs --source ./model", place)
    assert unlike.code == 1 and "theirs is of a quantised model, but " in unlike.err
    named = local_answer("inspect-shards out --source out", place)
    assert named.code == 1 and "out holds shards; give --source the checkpoint that out was cut from" in named.err


def test_shards_of_two_models_of_one_name_are_each_held_against_their_own(source: ResolvedSource) -> None:
    """The first changes in its place, and both are in the cache, with the same headers."""
    place, path = source.folder.parent, source.folder / "model.safetensors"
    assert local_answer("shard ./model --tp 2 --quantize fp8 -o one", place).code == 0
    data = bytearray(path.read_bytes())
    data[-40:] = bytes(40)
    path.write_bytes(data)
    assert local_answer("shard ./model --tp 2 --quantize fp8 -o two", place).code == 0
    found = {}
    for name in ("one", "two"):
        answer = local_answer(f"inspect-shards {name} --verify --json", place)
        assert answer.code == 0, answer.err
        found[name] = json.loads(answer.out)["verified"]["source"]
    assert found["one"] != found["two"]
    part = place / "two" / "model-rank-0-part-0.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert " of rank 0 is damaged" in local_answer("inspect-shards two --verify", place).err


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "report.json"])
@pytest.mark.parametrize("lost", [True, False], ids=["lost", "altered"])
def test_what_was_damaged_in_the_cache_is_not_used(source: ResolvedSource, file: str, lost: bool) -> None:
    folder = ensure_quantised(source, Method.FP8, notify=lambda text: None).source.folder
    path = (folder.parent if file == "report.json" else folder) / file
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    if lost:
        path.unlink()
    else:
        path.write_bytes(data[:-9] if file == "report.json" else data)
    with pytest.raises(SourceError, match="is damaged, tpctl made it otherwise; remove that folder") as caught:
        ensure_quantised(source, Method.FP8, notify=lambda text: None)
    assert str(folder.parent) in str(caught.value)
    shutil.rmtree(folder.parent)
    assert ensure_quantised(source, Method.FP8, notify=lambda text: None).source.folder == folder
