"""What a model would be once it is quantised, without its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.checkpoint.safetensors import TensorSpec
from tpctl.checkpoint.sources import quantised_id
from tpctl.json_file import read_object
from tpctl.partition.dtypes import DTYPES
from tpctl.quantizing.linears import ignored, quantised_shapes, refuse_quantised
from tpctl.quantizing.schemes import Method, quantization_config
from tpctl.quantizing.stacks import unstacked


@contextmanager
def quantised_metadata(metadata: ModelMetadata, method: Method) -> Iterator[ModelMetadata]:
    """``metadata`` of the model that ``--quantize`` would make; where there is only a config, of the usual names.

    Raises:
        UnsupportedModelError: the model is quantised already.
        CheckpointError: ``method`` does not take one of its linears.
    """
    config = read_object(metadata.folder / "config.json")
    refuse_quantised(metadata.folder, metadata.tensors or (), method)
    tensors = metadata.tensors
    if tensors is None:
        parsed = ModelConfig.load(metadata.folder)
        shapes = build_plan(parsed, 1).source_shapes
        tensors = {name: TensorSpec(name, DTYPES[parsed.dtype], shape) for name, shape in shapes.items()}
    stacks = unstacked(metadata.folder, {name: tensor.shape for name, tensor in tensors.items()}, method)
    found = quantised_shapes(tensors, method, stacks)
    with TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": quantization_config(method, ignored(tensors, stacks))})
        )
        yield replace(
            metadata,
            folder=folder,
            id=quantised_id(metadata.id, method),
            tensors={name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in found.items()},
        )
