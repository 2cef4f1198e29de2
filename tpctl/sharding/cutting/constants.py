"""Tensors of a checkpoint that say how others are packed, and have to be right: the shape of a weight, which no rank
needs, and the groups of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import as_held
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.safetensors import FileTensor
from tpctl.errors import CheckpointError
from tpctl.sharding.moving.files import Files

_DTYPES = {"I64": "<i8", "I32": "<i4"}


def check_constants(config: ModelConfig, folder: CheckpointFolder) -> None:
    """Check that they say what ``config.json`` says, by which the packed weights are cut.

    Raises:
        CheckpointError: one says another shape, or groups in another order, or that are not there; or it cannot be
            read.
    """
    blueprint = as_held(config, folder.tensors).blueprint
    with Files() as files:
        for name, shape in blueprint.constants(folder.tensors).items():
            file, info = folder.tensors[name]
            if info.dtype not in _DTYPES or info.shape != (len(shape),):
                raise CheckpointError(f"{name} is {info.dtype} {list(info.shape)}, but holds a shape, I64 [2]")
            found = tuple(int(n) for n in _read(files, file.path, info))
            if found != shape:
                raise CheckpointError(
                    f"{name} says that the weight is {found[0]} x {found[1]}, but it is {shape[0]} x {shape[1]} by "
                    "config.json; the two do not belong together"
                )
        for name, group in blueprint.ordered(folder.tensors).items():
            file, info = folder.tensors[name]
            if info.dtype not in _DTYPES:  # which is refused where dtypes are
                continue
            groups = _read(files, file.path, info)
            expected = np.arange(len(groups)) // group
            wrong = np.flatnonzero(groups != expected)
            if len(wrong):
                at = int(wrong[0])
                size = "one group" if group >= len(groups) else f"groups of {group}"
                raise CheckpointError(
                    f"{name} has input {at} in group {groups[at]}, but in {size} as they come, which desc_act false in "
                    f"config.json means, it is in group {expected[at]}; set it to true if that is so"
                )
        for name, count in blueprint.free_orders(folder.tensors).items():
            file, info = folder.tensors[name]
            if info.dtype not in _DTYPES:
                continue
            groups = _read(files, file.path, info)
            wrong = np.flatnonzero((groups < 0) | (groups >= count))
            if len(wrong):
                at = int(wrong[0])
                raise CheckpointError(
                    f"{name} puts input {at} into group {groups[at]}, but by config.json there are groups 0 to "
                    f"{count - 1}; the checkpoint is damaged, or was written wrongly"
                )


def _read(files: Files, path: Path, info: FileTensor) -> NDArray[np.signedinteger[Any]]:
    data = np.empty(info.nbytes, np.uint8)
    files.open(path)
    files.read(path, data, info.start)
    return data.view(_DTYPES[info.dtype])
