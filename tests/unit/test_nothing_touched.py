"""The table of bad input: what the sharding commands say to it, one line each, and that they touch nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.cli.app import main
from tpctl.sharding.cutting.shard import shard_checkpoint


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and everything that can be wrong with one."""
    shop = tmp_path_factory.mktemp("shop")
    model = make_checkpoint(shop / "model", make_config(), files=2)
    shard_checkpoint(model, shop / "two", 2)
    shard_checkpoint(model, shop / "some", 4, ranks=[0, 3])
    shard_checkpoint(model, shop / "flipped", 2)
    flip(shop / "flipped" / "model-rank-1-part-0.safetensors")
    shutil.copytree(shop / "two", shop / "edited")
    (shop / "edited" / "tpctl.json").write_text((shop / "two" / "tpctl.json").read_text().replace("llama", "lamda"))
    shutil.copytree(shop / "two", shop / "newer")
    (shop / "newer" / "tpctl.json").write_text('{"format_version": 99}')
    shutil.copytree(shop / "two", shop / "lost")
    (shop / "lost" / "model-rank-1-part-0.safetensors").unlink()
    shutil.copytree(shop / "two", shop / "short")
    os.truncate(shop / "short" / "model-rank-0-part-0.safetensors", 5000)
    (shop / "empty").mkdir()
    (shop / "home").mkdir()
    (shop / "home" / "letter.txt").write_text("dear")
    (shop / "file").write_text("x")
    for name in ("pickles", "cut", "bloom", "quantised", "wrong", "latin", "notjson", "incomplete"):
        make_checkpoint(shop / name, make_config(), files=2)
    for path in (shop / "pickles").glob("model*"):
        path.unlink()
    (shop / "pickles" / "pytorch_model.bin").write_text("x")
    os.truncate(shop / "cut" / "model-00002-of-00002.safetensors", 3000)
    (shop / "incomplete" / "model-00002-of-00002.safetensors").unlink()
    (shop / "bloom" / "config.json").write_text(json.dumps({**make_config(), "model_type": "bloom"}))
    quantised = {**make_config(), "quantization_config": {"quant_method": "gptq"}}
    (shop / "quantised" / "config.json").write_text(json.dumps(quantised))
    (shop / "wrong" / "config.json").write_text(json.dumps(make_config(intermediate_size=41)))
    (shop / "latin" / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xe9": 1}}')
    (shop / "notjson" / "config.json").write_text("{")
    (shop / "loop").symlink_to("loop")
    (shop / "prompts.jsonl").write_text('{"prompt": "x"}')
    os.mkfifo(shop / "pipe")
    shutil.copytree(shop / "two", shop / "pipes")
    shutil.copytree(shop / "model", shop / "piped")
    for path in (
        shop / "pipes" / "model-rank-0-part-0.safetensors",
        shop / "piped" / "tpctl.json",
    ):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    return shop


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """``main`` sets signal handlers, which are its process' own elsewhere."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


WRITERS = (
    "shard model --tp 2 -o",
    "shard model --tp 2 --ranks 0 -o",
    "shard model --tp 2 --force -o",
    "merge two -o",
    "reshard two --tp 3 -o",
    "download model -o",
    "inspect-shards two --html",
)
TABLE = [
    # shard: the source
    ("shard nowhere --tp 2", 1, "'nowhere' is no model: no such file or folder here; MODEL is a Hub id (org/name)"),
    ("shard ./nowhere --tp 2", 1, "there is no file or folder ./nowhere; MODEL is"),
    ("shard empty --tp 2", 1, "empty has no config.json; a checkpoint folder holds config.json and *.safetensors"),
    ("shard file --tp 2", 1, "file is no model: a file must be a .gguf, which begins with the letters GGUF"),
    ("shard pickles --tp 2", 1, "no *.safetensors weights, only PyTorch pickles (.bin)"),
    ("shard cut --tp 2", 1, "model-00002-of-00002.safetensors is truncated: its tensors end at byte"),
    ("shard incomplete --tp 2", 1, "1 of 2 weight files is not there (the first is model-00002-of-00002.safetensors)"),
    ("shard latin --tp 2", 1, "model.safetensors.index.json is not a safetensors index"),
    ("shard bloom --tp 2", 1, 'model_type "bloom" is not supported; tpctl knows'),
    ("shard quantised --tp 2", 1, 'the checkpoint is quantised ("gptq"), which is not supported yet'),
    ("shard wrong --tp 2", 1, "40 x 24 in the checkpoint but 41 x 24 by config"),
    ("shard notjson --tp 2", 1, "notjson/config.json is not valid JSON"),
    ("shard two --tp 3", 1, "two is cut into shards already; use `tpctl reshard two --tp 3 -o FOLDER`"),
    ("shard model --tp 2 --revision main", 1, "--revision main is for models on the Hub, but model is not one"),
    # shard: the cut
    ("shard model --tp 5", 1, "tensor-parallel size 5 does not fit 4 query heads; use --tp 1 to 4"),
    ("shard model --tp 4 --ranks 2-4", 1, "rank 4 does not exist at tp 4; ranks are 0 to 3"),
    ("shard model --tp 4 --ranks 3-1", 2, "'3-1' is no list of ranks; write it like 0-3 or 0,2,5-6"),
    ("shard model --tp 4 --ranks x", 2, "'x' is no list of ranks"),
    ("shard model --tp 2 --max-part-size 0", 2, "0 is less than a byte; write a size like 5GB"),
    ("shard model --tp 2 --max-part-size big", 2, "'big' is no size"),
    ("shard model --tp 2 --dtype int4", 2, "dtype 'int4' is unknown; use auto, "),
    ("shard model --tp 2 --compat ollama", 2, "--compat ollama is unknown; use vllm or sglang"),
    ("shard model --tp 3 --compat vllm", 1, "vllm loads only even splits"),
    # shard: the output
    ("shard model --tp 2 -o two", 1, "two exists already; use --force to replace it, or choose another folder (-o)"),
    ("shard model --tp 2 -o file --force", 1, "file is a file; choose another folder (-o)"),
    ("shard model --tp 2 -o file/below", 1, "file is no folder, so nothing can be made there; choose another (-o)"),
    ("shard model --tp 2 -o home --force", 1, "home holds no model, and --force replaces nothing else"),
    ("shard model --tp 2 -o model --force", 1, "model holds the source model itself; choose another folder (-o)"),
    ("shard model --tp 4 --ranks 0 -o some", 1, "some holds ranks 0, 3 of tp 4 already, and no other is asked for"),
    ("shard model --tp 2 --ranks 0 -o some", 1, "some holds ranks cut with tp size 4, but 2 is asked for"),
    ("shard model --tp 3 --ranks 1 -o some", 1, "some holds ranks cut with tp size 4, but 3 is asked for; use --force"),
    ("shard model --tp 2 --ranks 0 -o home", 1, "home exists already; use --force"),
    # merge and reshard
    ("merge model -o x", 1, "model has no tpctl.json; it is not a shard folder, make one with `tpctl shard`"),
    ("merge nowhere -o x", 1, "there is no folder nowhere"),
    ("merge some -o x", 1, "but all are needed; add ranks 1-2: `tpctl shard MODEL --tp 4 --ranks 1-2 -o some`"),
    ("merge flipped -o x", 1, "of rank 1 is damaged: its bytes in model-rank-1-part-0.safetensors hash to"),
    ("merge edited -o x", 1, "tpctl.json was altered after it was written; shard the model again"),
    ("merge newer -o x", 1, "tpctl.json has format version 99, this tpctl reads version 1; shard the model again"),
    ("merge lost -o x", 1, "model-rank-1-part-0.safetensors (rank 1) cannot be read: No such file"),
    ("merge short -o x", 1, "(rank 0) has 5000 bytes, but"),
    ("merge two -o model", 1, "model exists already; use --force"),
    ("merge two", 2, "-o"),
    ("reshard two --tp 5 -o x", 1, "tensor-parallel size 5 does not fit 4 query heads"),
    ("reshard some --tp 2 -o x", 1, "but all are needed; add ranks 1-2"),
    ("reshard flipped --tp 3 -o x", 1, "of rank 1 is damaged"),
    ("reshard two --tp 4 -o model", 1, "model exists already; use --force"),
    ("reshard two --tp 4 --ranks 0 -o two --force", 1, "two is two itself, which is read; choose another folder (-o)"),
    ("reshard two --tp 4 --ranks 0 -o two", 1, "two is two itself, which is read; choose another folder (-o)"),
    ("reshard two --tp 3 -o two/below", 1, "two/below is inside two, which is read; choose another folder (-o)"),
    ("merge two -o two --force", 1, "two is two itself, which is read; choose another folder (-o)"),
    ("merge two -o . --force", 1, ". holds the source two itself; choose another folder (-o)"),
    # links that lead back to themselves, and what is no file
    *(
        (f"{command} loop{below}", 1, f"loop{below} is a link that leads back to itself; choose another place")
        for command in WRITERS
        for below in ("", "/x")
    ),
    ("batch prompts.jsonl -o loop", 1, "loop is a link that leads back to itself; choose another place (-o)"),
    ("batch loop", 1, "cannot read loop: Too many levels of symbolic links"),
    ("shard ./loop --tp 2", 1, "cannot look at ./loop: Too many levels of symbolic links; MODEL is"),
    ("plan loop", 1, "cannot look at loop: Too many levels of symbolic links; MODEL is"),
    ("upload loop org/name", 1, "there is no folder loop"),
    ("inspect-shards loop", 1, "loop/tpctl.json cannot be read: Too many levels of symbolic links"),
    ("shard ./pipe --tp 2", 1, "pipe is a pipe or a device, no model; MODEL is"),
    ("inspect-shards piped", 1, "piped/tpctl.json is a folder, a pipe or a device, not a manifest"),
    ("merge pipes -o x", 1, "model-rank-0-part-0.safetensors (rank 0) has 0 bytes, but"),
    ("upload pipes org/name", 1, "model-rank-0-part-0.safetensors is a pipe, not the file of"),
    ("reshard two --tp 4 --ranks 7 -o x", 1, "rank 7 does not exist at tp 4; ranks are 0 to 3"),
    ("reshard two --tp 3 -o x --compat vllm", 1, "vllm loads only even splits"),
    # inspect-shards, plan, download, upload
    ("inspect-shards model", 1, "model has no tpctl.json"),
    ("inspect-shards flipped --verify", 1, "of rank 1 is damaged"),
    ("inspect-shards two --rank 2", 1, "rank 2 does not exist at tp 2; ranks are 0 to 1"),
    ("plan ./nowhere", 1, "there is no file or folder ./nowhere"),
    ("plan bloom", 1, 'model_type "bloom" is not supported'),
    ("plan model --gpu-memory much", 2, "'much' is no size"),
    ("download ./nowhere", 1, "there is no file or folder ./nowhere"),
    ("download model --local-ranks 0", 1, "--local-ranks is for sharded models on the Hub, but model is not one"),
    ("download model -o home", 1, "home exists and is not empty; choose another folder or remove it"),
    ("upload nowhere org/name", 1, "there is no folder nowhere"),
    ("upload empty org/name", 1, "empty has no config.json"),
    ("upload lost org/name", 1, "model-rank-1-part-0.safetensors is missing"),
    ("upload two name", 1, "'name' is no repository name; write org/name"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_is_one_line_and_changes_nothing(
    shop: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setattr(sys, "argv", ["tpctl", *arguments.split()])
    before = contents(shop)
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capfd.readouterr()
    assert (ended.value.code, out) == (code, "")
    assert message in error
    assert "Traceback" not in error
    if code == 1:
        assert error.startswith("tpctl: ") and error.count("\n") == 1
    assert contents(shop) == before
