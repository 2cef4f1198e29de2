"""Checkpoint folders that are quantised, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.synthetic import make_config
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.quantizing.schemes import Method
from tpctl.quantizing.writer import QuantizationReport, quantise_checkpoint

HIDDEN, INNER = 128, 256

LAYER = "model.layers.0."

LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (64, HIDDEN),
    "self_attn.v_proj": (64, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}

MLP = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def dense(layers: int = 2, dtype: str = "BF16") -> list[TensorSpec]:
    """The tensors of a small Llama."""
    specs = [
        TensorSpec("model.embed_tokens.weight", dtype, (70, HIDDEN)),
        TensorSpec("lm_head.weight", dtype, (70, HIDDEN)),
    ]
    for layer in range(layers):
        named = {**LINEARS, **{f"mlp.{name}": shape for name, shape in MLP.items()}}
        specs += [TensorSpec(f"model.layers.{layer}.{name}.weight", dtype, shape) for name, shape in named.items()]
        specs += [TensorSpec(f"model.layers.{layer}.input_layernorm.weight", dtype, (HIDDEN,))]
        specs += [TensorSpec(f"model.layers.{layer}.self_attn.q_proj.bias", dtype, (HIDDEN,))]
    return specs


def write(folder: Path, specs: list[TensorSpec], files: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of small random values."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    names = (
        ["model.safetensors"] if files == 1 else [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    )
    for index, name in enumerate(names):
        header = build_header(specs[index::files])
        data = b""
        for info in sorted(header.tensors.values(), key=lambda info: info.start):
            values = (rng.standard_normal(info.shape) * 0.1).astype("<f4")
            if info.dtype == "BF16":
                data += (values.view("<u4") >> 16).astype("<u2").tobytes()
            elif info.dtype in ("F16", "F32", "F64"):
                data += values.astype(f"<f{int(info.dtype[1:]) // 8}").tobytes()
            else:
                data += bytes(info.nbytes)
        (folder / name).write_bytes(header.raw + data)
    if files > 1:
        where = {one.name: name for i, name in enumerate(names) for one in specs[i::files]}
        index_of = {"metadata": {"total_size": sum(one.nbytes for one in specs), "note": "kept"}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_of))
    (folder / "config.json").write_text(json.dumps(make_config(hidden_size=HIDDEN) if config is None else config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def quantise(source: Path, out: Path, method: Method) -> QuantizationReport:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return quantise_checkpoint(CheckpointFolder.open(source), out, method)


MEASURE = """
import re, sys
from pathlib import Path
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.quantizing.writer import quantise_checkpoint
from tpctl.quantizing.schemes import SCHEMES, Method
quantise_checkpoint(CheckpointFolder.open(Path(sys.argv[1])), Path(sys.argv[2]), Method(sys.argv[3]))
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
assert not {"torch", "transformers"} & set(sys.modules)
"""
