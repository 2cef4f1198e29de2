"""shard, inspect-shards, merge and reshard as commands: what they print, and how they end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.forked import Forks, forks
from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.cli.shard import print_report
from tpctl.sharding.cutting.writer import ShardReport

Tpctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config(num_attention_heads=6))


@pytest.fixture(scope="module")
def commands() -> Iterator[Forks]:
    with forks() as started:
        yield started


@pytest.fixture
def tpctl(commands: Forks) -> Tpctl:
    return lambda *arguments, cwd=None: commands.run(map(str, arguments), cwd=cwd)


def test_there_and_back_again(tpctl: Tpctl, source: Path, tmp_path: Path) -> None:
    done = tpctl("shard", source, "--tp", "3", "-o", tmp_path / "three")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'three'}: {source} (llama) cut for tp 3\n3 files, ")
    assert "rank 2" in done.stdout
    done = tpctl("inspect-shards", tmp_path / "three", "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "match their digests" in done.stdout
    assert f"equal {source}" in done.stdout
    done = tpctl("reshard", tmp_path / "three", "--tp", "2", "-o", tmp_path / "two")
    assert (done.returncode, done.stderr) == (0, "")
    done = tpctl("merge", tmp_path / "two", "-o", tmp_path / "merged")
    assert (done.returncode, done.stderr) == (0, "")
    assert "byte for byte the source" in done.stdout
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


@pytest.mark.parametrize("command", [("merge",), ("reshard", "--tp", "3")])
def test_what_the_manifest_does_not_list_stays_behind_by_name(
    tpctl: Tpctl, source: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (source / "LICENSE").unlink()
    assert tpctl("shard", source, "--tp", "2", "-o", tmp_path / "two").returncode == 0
    (tmp_path / "two" / "LICENSE").write_text("free")
    name, *options = command
    done = tpctl(name, "two", *options, "-o", "one", cwd=tmp_path)
    assert done.stderr == "LICENSE is not listed in two/tpctl.json and stays behind\n" and done.returncode == 0
    assert not (tmp_path / "one" / "LICENSE").exists()
    for other in ("NOTICE", "a.py", "b.py", "c\x1b.py", "model-rank-9-part-0.safetensors", ".hidden"):
        (tmp_path / "two" / other).write_text("free")
    done = tpctl(name, "two", *options, "-o", "one", "--force", "--json", cwd=tmp_path)
    said = "LICENSE, NOTICE, a.py and 2 more files are not listed in two/tpctl.json and stay behind\n"
    assert (done.returncode, done.stderr) == (0, said) and json.loads(done.stdout)["folder"] == "one"


def test_json_is_the_whole_output(tpctl: Tpctl, source: Path, tmp_path: Path) -> None:
    done = tpctl("shard", source, "--tp", "2", "-o", tmp_path / "two", "--json", "--dtype", "float32")
    report = json.loads(done.stdout)
    assert (report["tp_size"], report["dtype"], report["resumed_bytes"]) == (2, "F32", 0)
    sizes = {str(r): (tmp_path / "two" / f"model-rank-{r}-part-0.safetensors").stat().st_size for r in (0, 1)}
    assert report["bytes_per_rank"] == sizes
    report = json.loads(tpctl("inspect-shards", tmp_path / "two", "--rank", "1", "--json").stdout)
    [rank] = report["ranks"]
    assert rank["rank"] == 1
    qkv = next(t for t in rank["tensors"] if t["name"] == "model.layers.0.self_attn.qkv_proj.weight")
    assert qkv["shape"] == [30, 24]
    assert qkv["pieces"][0] == {
        "source": "model.layers.0.self_attn.q_proj.weight",
        "label": "q",
        "ranges": [[18, 36], [0, 24]],
    }
    report = json.loads(tpctl("merge", tmp_path / "two", "-o", tmp_path / "merged", "--json").stdout)
    assert report["exact"] is False
    report = json.loads(tpctl("reshard", tmp_path / "two", "--tp", "1", "-o", tmp_path / "one", "--json").stdout)
    assert report["tp_size"] == 1


def test_the_default_output_is_named_after_the_model(tpctl: Tpctl, source: Path, tmp_path: Path) -> None:
    assert tpctl("shard", source, "--tp", "2", cwd=tmp_path).returncode == 0
    assert (tmp_path / "model-tp2" / "tpctl.json").is_file()


def test_ranks_and_part_sizes(tpctl: Tpctl, source: Path, tmp_path: Path) -> None:
    done = tpctl("shard", source, "--tp", "4", "--ranks", "1-2", "--max-part-size", "3kB", "-o", tmp_path / "out")
    assert done.returncode == 0
    ranks = {path.name.split("-")[2] for path in (tmp_path / "out").glob("model-*")}
    assert ranks == {"1", "2"}
    line = "missing of tp 4: ranks 0, 3; add with --ranks 0,3 and the same folder\n"
    assert done.stdout.endswith(line)
    done = tpctl("shard", source, "--tp", "4", "--ranks", "0,3", "--max-part-size", "3kB", "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "missing" not in done.stdout
    assert tpctl("merge", tmp_path / "out", "-o", tmp_path / "merged").returncode == 0
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


def test_what_an_earlier_run_left_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    report = ShardReport("out", "m", "llama", 1, None, None, 3, {0: 100}, 1, 1.0, (), 0, 0)
    print_report(report)
    assert len(capsys.readouterr().out.splitlines()) == 3
    print_report(replace(report, resumed_bytes=40))
    assert "resumed: 40 B were complete already" in capsys.readouterr().out
    print_report(replace(report, dropped_bytes=50))
    assert "dropped: 50 B that an unfinished run left, of another source, revision" in capsys.readouterr().out
