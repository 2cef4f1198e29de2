"""Checkpoints with the shape of a known model and random weights, for speed that needs no download.

Weights are bfloat16 from a normal distribution, cut from one random block at shifting offsets: enough disorder to
keep the arithmetic honest (zeros run faster than data) at the speed of the disk. Norm weights are one. There is no
tokenizer: the workloads are token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tpctl.arch.config import ModelConfig
from tpctl.checkpoint.cache import cache_root, locked
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.errors import UsageError
from tpctl.partition.split import source_shapes

_COMMON: dict[str, Any] = {"hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
}

_BLOCK = 32 << 20  # bfloat16 values in the random block
_SCALE = 0.02
_FILE_BYTES = 5_000_000_000


def shape_config(shape: str) -> ModelConfig:
    """What ``config.json`` of the named shape says.

    Raises:
        UsageError: no such shape.
    """
    if shape not in SHAPES:
        raise UsageError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return ModelConfig.from_dict({**_COMMON, **SHAPES[shape]})


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
    tensors = [TensorSpec(name, "BF16", shape) for name, shape in source_shapes(parsed.blueprint.splits()).items()]
    files: list[list[TensorSpec]] = [[]]
    for tensor in tensors:
        if sum(t.nbytes for t in files[-1]) + tensor.nbytes > _FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    block = _random_block()
    weight_map = {}
    for number, group in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update({tensor.name: name for tensor in group})
        _write_file(folder / name, group, block)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    architecture = {"architectures": [parsed.family.architecture]}
    (folder / "config.json").write_text(json.dumps({**_COMMON, **architecture, **config}), encoding="utf-8")


def _random_block() -> np.ndarray[Any, np.dtype[np.uint16]]:
    values = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32) * np.float32(_SCALE)
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # truncated to bfloat16, which is random enough


def _write_file(path: Path, tensors: list[TensorSpec], block: np.ndarray[Any, np.dtype[np.uint16]]) -> None:
    header = build_header(tensors)
    one = np.full(1 << 16, 0x3F80, dtype=np.uint16)  # 1.0
    with path.open("wb") as file:
        file.write(header.raw)
        for number, info in enumerate(sorted(header.tensors.values(), key=lambda t: t.start)):
            source, at = (one, 0) if len(info.shape) == 1 else (block, number * 7919 % 4096)
            left = info.nbytes // 2
            while left:
                piece = source[at : at + left]
                file.write(piece.data.cast("B"))
                left -= len(piece)
                at = 0
