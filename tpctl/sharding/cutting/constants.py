"""Tensors of a checkpoint that hold the shape of a packed weight: what no rank needs, but has to be right."""

from __future__ import annotations

import numpy as np

from tpctl.arch.config import ModelConfig
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.errors import CheckpointError
from tpctl.sharding.moving.files import Files

_DTYPES = {"I64": "<i8", "I32": "<i4"}


def check_constants(config: ModelConfig, folder: CheckpointFolder) -> None:
    """Check that they say what ``config.json`` says, by which the packed weights are cut.

    Raises:
        CheckpointError: one says another shape; or it cannot be read.
    """
    with Files() as files:
        for name, shape in config.blueprint.constants(folder.tensors).items():
            file, info = folder.tensors[name]
            if info.dtype not in _DTYPES or info.shape != (len(shape),):
                raise CheckpointError(f"{name} is {info.dtype} {list(info.shape)}, but holds a shape, I64 [2]")
            data = np.empty(info.nbytes, np.uint8)
            files.open(file.path)
            files.read(file.path, data, info.start)
            found = tuple(int(n) for n in data.view(_DTYPES[info.dtype]))
            if found != shape:
                raise CheckpointError(
                    f"{name} says that the weight is {found[0]} x {found[1]}, but it is {shape[0]} x {shape[1]} by "
                    "config.json; the two do not belong together"
                )
