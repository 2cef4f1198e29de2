"""Tiny checkpoints of every family, random and valid, for tests that need bytes but no meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpctl.arch.blueprint import EMBEDDING, LM_HEAD
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.safetensors import TensorSpec, build_header

BASE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "vocab_size": 70,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "hidden_act": "silu",
}


MIXTURE: dict[str, Any] = {
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "first_k_dense_replace": 1,
    "full_attention_interval": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "partial_rotary_factor": 1.0,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 80,
}
"""Sizes that families with experts, or with other layers than attention, have beside those."""

BIASES = ("attention_bias", "mlp_bias")

RUN = sorted(name for name, family in FAMILIES.items() if family.runs)
"""The families that tpctl runs; those that it only cuts have configs and tests of their own."""


def make_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A small ``config.json`` of ``family``, with ``changes``, but for biases that it cannot have."""
    known = FAMILIES[family].defaults
    has = {key: value for key, value in MIXTURE.items() if known.get(key)}
    changes = {key: value for key, value in changes.items() if key in known or key not in BIASES}
    return {**BASE, **has, "model_type": family, "architectures": [FAMILIES[family].architecture], **changes}


def source_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of ``config`` has."""
    return dict(build_plan(ModelConfig.from_dict(config), 1).source_shapes)


def source_tensors(config: Mapping[str, Any], dtype: str = "BF16") -> list[TensorSpec]:
    """The same with their dtypes: ``dtype`` where they are floats, the first that a quantised format has otherwise."""
    plan = build_plan(ModelConfig.from_dict(config), 1)
    exact = {source: split.dtypes[0] for split in plan.splits if split.dtypes for source in split.sources}
    return [TensorSpec(name, exact.get(name, dtype), shape) for name, shape in plan.source_shapes.items()]


def make_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "BF16",
    files: int = 1,
    seed: int = 0,
    tied_name: str = EMBEDDING,
    extra: Sequence[TensorSpec] = (),
) -> Path:
    """Write a checkpoint of random bytes, in ``files`` files, with a tokenizer and a licence beside it."""
    folder.mkdir(parents=True)
    tensors = source_tensors(config, dtype)
    if config["tie_word_embeddings"] and tied_name == LM_HEAD:
        tensors = [TensorSpec(LM_HEAD, t.dtype, t.shape) if t.name == EMBEDDING else t for t in tensors]
    tensors += extra
    rng = np.random.default_rng(seed)
    groups = [tensors[index::files] for index in range(files)]
    names = ["model.safetensors"]
    if files > 1:
        names = [f"model-{index + 1:05}-of-{files:05}.safetensors" for index in range(files)]
        weight_map = {t.name: name for name, group in zip(names, groups, strict=True) for t in group}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, group in zip(names, groups, strict=True):
        header = build_header(group)
        data = rng.integers(0, 256, header.file_size - header.size, dtype=np.uint8).tobytes()
        (folder / name).write_bytes(header.raw + data)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("free")
    return folder


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    others: Sequence[TensorSpec] = (),
) -> Path:
    """Write a checkpoint of raw elements (as ``read_tensors`` gives them); dtypes by the config, but for ``others``."""
    folder.mkdir(parents=True)
    dtypes = {spec.name: spec.dtype for spec in (*source_tensors(config), *others)}
    header = build_header(TensorSpec(name, dtypes.get(name, "BF16"), data.shape) for name, data in tensors.items())
    (folder / "model.safetensors").write_bytes(
        header.raw + b"".join(tensors[name].tobytes() for name in header.tensors)
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def read_tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a checkpoint folder as an array of raw elements (unsigned integers of the element's size)."""
    from tpctl.checkpoint.folder import CheckpointFolder

    found = {}
    for name, (file, info) in CheckpointFolder.open(folder).tensors.items():
        data = file.path.read_bytes()[info.start : info.stop]
        size = info.nbytes // max(1, int(np.prod(info.shape)))
        found[name] = np.frombuffer(data, f"<u{size}").reshape(info.shape)
    return found


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
