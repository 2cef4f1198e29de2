"""Checkpoints with the shape of a known model and random weights, for speed that needs no download.

Weights are from a normal distribution, in bfloat16 or e4m3, or integers of any value, cut from one random block at
shifting offsets: enough disorder to keep the arithmetic honest (zeros run faster than data) at the speed of the disk.
Norm weights are one, scales such that weights are of the usual size. There is no
tokenizer: the workloads are token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tpctl.arch.config import ModelConfig
from tpctl.bench.shapes import COMMON, SHAPES
from tpctl.checkpoint.cache import cache_root, locked
from tpctl.checkpoint.safetensors import FileTensor, TensorSpec, build_header
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.errors import UsageError
from tpctl.partition.split import TensorSplit, source_shapes

_BLOCK = 32 << 20  # values in the random block
_SCALE = 0.02
_FILE_BYTES = 5_000_000_000


def shape_config(shape: str) -> ModelConfig:
    """What ``config.json`` of the named shape says.

    Raises:
        UsageError: no such shape.
    """
    if shape not in SHAPES:
        raise UsageError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return ModelConfig.from_dict({**COMMON, **SHAPES[shape]})


def synthetic_source(shape: str) -> ResolvedSource:
    """A checkpoint of the named shape, made in the cache on first use.

    Raises:
        UsageError: no such shape.
    """
    config = shape_config(shape)
    folder = cache_root() / "synthetic" / shape
    with locked(folder.with_name(f".{shape}.lock")):
        if not (folder / "config.json").is_file():
            _write(SHAPES[shape], config, folder)
    return ResolvedSource(folder, f"synthetic/{shape}", None)


def _write(config: dict[str, Any], parsed: ModelConfig, folder: Path) -> None:
    """Weights first, ``config.json`` last: a folder that has one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(parsed)
    files: list[list[TensorSpec]] = [[]]
    for tensor in tensors:
        if sum(t.nbytes for t in files[-1]) + tensor.nbytes > _FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    blocks = _random_blocks()
    weight_map = {}
    for number, group in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update({tensor.name: name for tensor in group})
        _write_file(folder / name, group, blocks)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    architecture = {"architectures": [parsed.family.architecture]}
    (folder / "config.json").write_text(json.dumps({**COMMON, **architecture, **config}), encoding="utf-8")


def _tensors(parsed: ModelConfig) -> list[TensorSpec]:
    """All of a checkpoint, but for those that only some have."""
    splits = [split for split in parsed.blueprint.splits() if not split.optional]
    dtypes = {name: _dtype(split) for split in splits for name in split.sources}
    return [TensorSpec(name, dtypes[name], shape) for name, shape in source_shapes(splits).items()]


def _dtype(split: TensorSplit) -> str:
    """Of those that the sources may have; floats are bfloat16, scales mostly."""
    return "BF16" if split.dtypes is None or "BF16" in split.dtypes else split.dtypes[0]


Block = np.ndarray[Any, np.dtype[np.uint8]]


def _random_blocks() -> dict[str, Block]:
    """Random bytes of weights in each dtype that weights are stored in."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(_BLOCK, dtype=np.float32)
    truncated = ((values * np.float32(_SCALE)).view(np.uint32) >> 16).astype(np.uint16)  # which is random enough
    # e4m3 of a float32 below 448 and above 2^-6: its sign, 4 bits of exponent with a bias of 7 and 3 of mantissa.
    bits = np.clip(np.abs(values), 2.0**-6, 448.0).astype(np.float32).view(np.uint32)
    codes = (((bits >> 20) - (120 << 3)) | (values < 0).astype(np.uint32) << 7).astype(np.uint8)
    anything = rng.integers(0, 256, _BLOCK, dtype=np.uint8)
    return {"BF16": truncated.view(np.uint8), "F8_E4M3": codes, "I32": anything, "U8": anything, "I8": anything}


def _scale(info: FileTensor) -> Block | None:
    """The bytes of one scale, of those that make weights of the usual size from codes; ``None``: it is none."""
    if "scale" not in info.name:
        return None
    if info.dtype == "U8":
        return np.array([127 - 7], np.uint8)  # 2^-7
    width = _SCALE if "inv" in info.name else _SCALE / 4.6 if len(info.shape) == 2 and info.shape[1] > 1 else _SCALE
    value = np.array([width], np.float32)
    return value.view(np.uint8) if info.dtype == "F32" else value.view(np.uint8)[2:]


def _write_file(path: Path, tensors: list[TensorSpec], blocks: dict[str, Block]) -> None:
    header = build_header(tensors)
    one = np.array([0x3F80], np.uint16).view(np.uint8)  # 1.0 in bfloat16
    with path.open("wb") as file:
        file.write(header.raw)
        for number, info in enumerate(sorted(header.tensors.values(), key=lambda t: t.start)):
            same = _scale(info)
            if same is None and len(info.shape) == 1 and info.dtype == "BF16":
                same = one
            if same is not None:
                source, at = np.tile(same, 1 << 16), 0
            else:
                source, at = blocks[info.dtype], number * 7919 % 4096 * 4
            left = info.nbytes
            while left:
                piece = source[at : at + left]
                file.write(piece.data)
                left -= len(piece)
                at = 0
