"""Folders with everything that can be wrong with a model, or with shards of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.sharding.cutting.shard import shard_checkpoint

PART = "model-rank-1-part-0.safetensors"


def flip(path: Path, place: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def to_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def data_place(folder: Path) -> int:
    return read_header(folder / PART).size + 100


Change = Callable[[Path], object]
CHANGES: dict[str, Change] = {
    "cut": lambda folder: os.truncate(folder / PART, 100),
    "flipped": lambda folder: flip(folder / PART, data_place(folder)),
    "header": lambda folder: flip(folder / PART, 200),
    "manifest": lambda folder: flip(
        folder / "tpctl.json", (folder / "tpctl.json").read_bytes().rindex(b'"digest":"') + 12
    ),
    "edited": lambda folder: (folder / "config.json").write_text("{}"),
    "stray": lambda folder: shutil.copy(folder / PART, folder / "model-rank-1-part-7.safetensors"),
    "some": lambda folder: (folder / PART).unlink(),
    "renamed": lambda folder: rewrite(folder / "tpctl.json", "llama", "lamda"),
    "newer": lambda folder: (folder / "tpctl.json").write_text('{"format_version": 99}'),
    "pipes": lambda folder: to_pipe(folder / "model-rank-0-part-0.safetensors"),
}
"""Copies of the shard folder ``shards`` (tp 2), each with one thing wrong."""


def prepare(folder: Path) -> None:
    """What the commands below are pointed at."""
    model = make_checkpoint(folder / "model", make_config())
    shard_checkpoint(model, folder / "shards", 2)
    shard_checkpoint(model, folder / "rank0", 2, ranks=[0])
    shard_checkpoint(model, folder / "two-of-4", 4, ranks=[0, 3])
    make_checkpoint(folder / "other", make_config("qwen3"))
    experts = {"num_experts": 6, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
    dealt = make_checkpoint(folder / "experts", make_config("qwen3_moe", **experts))
    shard_checkpoint(dealt, folder / "dealt", 2, cutting=Cutting(2))
    make_checkpoint(folder / "unrun", make_config("gemma4_text", vocab_size_per_layer_input=60))
    shutil.copytree(folder / "shards", folder / "my shards")
    shutil.copytree(folder / "rank0", folder / "my rank")
    for name, change in CHANGES.items():
        change(shutil.copytree(folder / "shards", folder / name))
    make_checkpoint(folder / "narrow", make_config()).joinpath("config.json").write_text(
        json.dumps(make_config(vocab_size=71))
    )
    os.truncate(make_checkpoint(folder / "short", make_config()) / "model.safetensors", 5000)
    (folder / "mamba").mkdir()
    (folder / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    (folder / "mamba" / "model.safetensors").touch()
    (folder / "pickles").mkdir()
    (folder / "pickles" / "config.json").write_text(json.dumps(make_config()))
    (folder / "pickles" / "pytorch_model.bin").touch()
    (folder / "empty").mkdir()
    other_kinds(model, folder)
    in_two_files(folder)
    in_the_way(folder)


def other_kinds(model: Path, folder: Path) -> None:
    """Checkpoints that are something else than they seem."""
    wide = Path(shutil.copytree(model, folder / "wide")) / "model.safetensors"
    header = read_header(wide)
    data = bytearray(header.file_size - header.size)
    data[200:202] = b"\x89\x47"  # 70144 in bfloat16
    wide.write_bytes(header.raw + data)
    tensor = TensorSpec("model.layers.0.self_attn.q_proj.qweight", "I32", (3, 24))
    make_checkpoint(folder / "awq", make_config(), extra=[tensor])
    capped = Path(shutil.copytree(model, folder / "capped"))
    (capped / "config.json").write_text(json.dumps(make_config(final_logit_softcapping=30.0)))
    scaled = Path(shutil.copytree(model, folder / "scaled"))
    (scaled / "config.json").write_text(json.dumps(make_config(layer_scale=0.1)))
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "lora" / "adapter_model.safetensors").touch()


CONFIGS = {
    "bloom": {**make_config(), "model_type": "bloom"},
    "quantised": {**make_config(), "quantization_config": {"quant_method": "bitsandbytes"}},
    "wrong": make_config(intermediate_size=41),
}


def in_two_files(folder: Path) -> None:
    """Checkpoints of two weight files and an index, each with one thing wrong."""
    for name in ("torn", "incomplete", "latin", "notjson", *CONFIGS):
        make_checkpoint(folder / name, make_config(), files=2)
    os.truncate(folder / "torn" / "model-00002-of-00002.safetensors", 3000)
    (folder / "incomplete" / "model-00002-of-00002.safetensors").unlink()
    (folder / "latin" / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xe9": 1}}')
    (folder / "notjson" / "config.json").write_text("{")
    for name, config in CONFIGS.items():
        (folder / name / "config.json").write_text(json.dumps(config))


def in_the_way(folder: Path) -> None:
    """What stands where a model or a result should."""
    (folder / "home").mkdir()
    (folder / "home" / "letter.txt").write_text("dear")
    (folder / "file").write_text("x")
    (folder / "prompts.jsonl").write_text('{"prompt": "x"}')
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    (folder / "openai.jsonl").write_text(json.dumps(asked))
    (folder / "mixed.jsonl").write_text('{"prompt": "x"}\n' + json.dumps(asked))
    table = pa.table({"question": ["x", "y"], "label": [1, 2], "image": [b"x", b"y"]})
    pq.write_table(table, folder / "rows.parquet")
    (folder / "damaged.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-9])
    (folder / "tables").mkdir()
    pq.write_table(table, folder / "tables" / "a.parquet")
    (folder / "loop").symlink_to("loop")
    to_pipe(folder / "pipe")
    to_pipe(Path(shutil.copytree(folder / "model", folder / "piped")) / "tpctl.json")
