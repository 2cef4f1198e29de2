"""A checkpoint folder of floats made into one of compressed-tensors' format, a band of rows at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from pathlib import Path

import numpy as np

from tpctl.checkpoint.cache import require_space
from tpctl.checkpoint.folder import INDEX, CheckpointFolder
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.safetensors import FileTensor, Header, TensorSpec, build_header
from tpctl.json_file import parse_object, read_object
from tpctl.quantizing.linears import FLOATS, ignored, linears, refuse_quantised, stored
from tpctl.quantizing.rounding import Loss, check_finite, elements, quantise_rows
from tpctl.quantizing.schemes import SCHEMES, Method, Scheme, quantization_config
from tpctl.quantizing.stacks import Unstacked, Weight, unstacked
from tpctl.sharding.moving.copied import copy_file
from tpctl.sharding.moving.files import ByteCounter, Bytes, Files, in_parallel

_BAND = 1 << 19
"""Values that a thread reads at a time, unless one row has more."""


@dataclass(frozen=True)
class TensorLoss:
    """What a weight has lost.

    Attributes:
        relative: the norm of the difference by the norm of the weight.
        largest: the largest difference of a value.
    """

    name: str
    shape: tuple[int, int]
    relative: float
    largest: float


@dataclass(frozen=True)
class QuantizationReport:
    """A quantised model; bytes are those of all tensors, also of those that stay as they are."""

    method: str
    bytes_before: int
    bytes_after: int
    tensors: tuple[TensorLoss, ...]


def quantise_checkpoint(
    source: CheckpointFolder, out: Path, method: Method, *, progress: Progress | None = None
) -> QuantizationReport:
    """Write ``source``, its linears quantised by ``method``, into the empty folder ``out``; all is on disk afterwards.

    Files keep their names, and tensors stay in their files; experts that are stacked become a tensor each. Names,
    dtypes and shapes are checked before a byte of data is read. Memory use does not depend on the model's size: a few
    bands for each thread.

    Raises:
        UnsupportedModelError: the source is quantised already.
        CheckpointError: it holds a linear that cannot be quantised, or a value that is NaN or infinite.
        SourceError: the disk has too little space.
        OSError: as the file system says.
    """
    (chosen, stacks), scheme = linears_of(source, method), SCHEMES[method]
    tensors = {name: info for name, (_, info) in source.tensors.items()}
    targets = {file.name: _target(file.header, chosen, stacks, scheme) for file in source.files}
    require_space(out, sum(header.file_size for header in targets.values()), f"{source.path} quantised to {method}")
    losses: dict[str, Loss] = {}
    with Files() as files:
        tally = ByteCounter(sum(info.nbytes for info in tensors.values()), "", progress)
        tasks: list[Callable[[], None]] = []
        for file in source.files:
            path, header = out / file.name, targets[file.name]
            with path.open("xb") as target:
                target.write(header.raw)
                target.truncate(header.file_size)
            files.open(file.path)
            files.open(path, os.O_RDWR)
            job = _Job(file.path, path, header, files, tally)
            for info in sorted(file.header.tensors.values(), key=lambda info: info.start):
                for weight in chosen.get(info.name, ()):
                    tasks.append(partial(job.quantise, info, weight, scheme, losses))
                if info.name not in chosen:
                    tasks.append(partial(job.copy, info, stacks.renamed.get(info.name, info.name)))
        in_parallel(tasks, tally)
        files.sync(out / name for name in targets)
    _write_small_files(source, out, targets, quantization_config(method, ignored(tensors, stacks)))
    source.check_unchanged()
    return QuantizationReport(
        method,
        sum(info.nbytes for info in tensors.values()),
        sum(info.nbytes for header in targets.values() for info in header.tensors.values()),
        tuple(_tensor_loss(weight, losses[weight.name]) for weights in chosen.values() for weight in weights),
    )


def linears_of(source: CheckpointFolder, method: Method) -> tuple[dict[str, tuple[Weight, ...]], Unstacked]:
    """The weights of ``source`` that are quantised, by the tensors that hold them; and its stacks of experts.

    Raises:
        UnsupportedModelError: it is quantised already.
        CheckpointError: it holds a linear that cannot be quantised.
        UnsupportedModelError: it holds stacks of experts, and is of a model that tpctl does not know.
    """
    refuse_quantised(source.path, source.tensors, method)
    tensors = {name: info for name, (_, info) in source.tensors.items()}
    stacks = unstacked(source.path, source.shapes, method)
    return linears(tensors, method, stacks), stacks


@dataclass(frozen=True)
class _Job:
    """One source file and the file that is made of it, both open."""

    source: Path
    path: Path
    header: Header
    files: Files
    tally: ByteCounter

    def copy(self, info: FileTensor, name: str) -> None:
        """Copy the tensor ``info``, whose values must be finite, to one of that ``name``."""
        target = self.header.tensors[name]
        step = 8 * _BAND
        for start in range(0, info.nbytes, step):
            self.tally.check()
            data = np.empty(min(step, info.nbytes - start), np.uint8)
            self.files.read(self.source, data, info.start + start)
            if info.dtype in FLOATS:
                check_finite(elements(data, info.dtype), info.dtype, info.name)
            self.files.write(self.path, data, target.start + start)
            self.tally.add(data.size)

    def quantise(self, info: FileTensor, weight: Weight, scheme: Scheme, losses: dict[str, Loss]) -> None:
        """Write what is stored of ``weight``, which ``info`` holds, and enter into ``losses`` what it has lost."""
        targets = [self.header.tensors[name] for name in stored(weight, info.dtype, scheme)]
        numbers, scales = (target.start for target in targets[:2])
        if len(targets) == 3:
            self.files.write(self.path, np.array(weight.shape, "<i8").view(np.uint8), targets[2].start)
        width = weight.shape[1]
        item = info.nbytes // prod(info.shape)
        first = info.start + weight.first * width * item
        loss, begin = Loss(), 0
        for band in _bands(weight.shape, scheme):
            self.tally.check()
            rows, columns = len(band.rows), len(band.columns)
            data = np.empty((rows, columns * item), np.uint8)
            self._each_row(self.files.read, self.source, data, band, first, width * item)
            made = quantise_rows(elements(data, info.dtype), info.dtype, scheme, weight.name)
            self._each_row(self.files.write, self.path, made.numbers, band, numbers, width * scheme.bits // 8)
            self.files.write(self.path, made.scales, scales + begin)
            begin += made.scales.nbytes
            loss += made.loss
            self.tally.add(data.size)
        losses[weight.name] = loss

    def _each_row(
        self, move: Callable[[Path, Bytes, int], None], path: Path, data: Bytes, band: _Band, start: int, width: int
    ) -> None:
        """``move`` the bytes of ``band``, of a matrix that begins at ``start`` and has rows of ``width`` bytes."""
        if data.shape[1] == width:
            move(path, data, start + band.rows.start * width)
            return
        offset = band.columns.start * data.shape[1] // len(band.columns)
        for row, line in zip(band.rows, data, strict=True):
            move(path, line, start + row * width + offset)


@dataclass(frozen=True)
class _Band:
    """What is quantised at a time; scales follow each other in the order of bands."""

    rows: range
    columns: range


def _bands(shape: tuple[int, int], scheme: Scheme) -> Iterator[_Band]:
    """The matrix in bands: whole rows, or some of the blocks that stand beside each other."""
    rows, columns = shape
    height, width = max(1, _BAND // columns), columns
    if scheme.rows > 1 and scheme.columns is not None:
        height, width = scheme.rows, max(1, _BAND // (scheme.rows * scheme.columns)) * scheme.columns
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield _Band(range(row, min(row + height, rows)), range(column, min(column + width, columns)))


def _target(header: Header, chosen: Mapping[str, tuple[Weight, ...]], stacks: Unstacked, scheme: Scheme) -> Header:
    """The header of the file that is made of the one with ``header``."""
    specs: list[TensorSpec] = []
    for name, info in header.tensors.items():
        for weight in chosen.get(name, ()):
            made = stored(weight, info.dtype, scheme)
            specs += [TensorSpec(new, dtype, shape) for new, (dtype, shape) in made.items()]
        if name not in chosen:
            specs.append(TensorSpec(stacks.renamed.get(name, name), info.dtype, info.shape))
    return build_header(specs, {"format": "pt", **header.metadata})


def _write_small_files(
    source: CheckpointFolder,
    out: Path,
    targets: Mapping[str, Header],
    quantization: Mapping[str, object],
) -> None:
    for path in source.small_files():
        if path.name != "config.json":
            copy_file(path, out / path.name)
    _write_json(out / "config.json", {**read_object(source.path / "config.json"), "quantization_config": quantization})
    if source.index is not None:
        index = parse_object(source.index.encode(), INDEX)
        kept = index.get("metadata")
        held = {name: info for header in targets.values() for name, info in header.tensors.items()}
        files = {name: file for file, header in targets.items() for name in header.tensors}
        index["metadata"] = {
            **(kept if isinstance(kept, dict) else {}),
            "total_size": sum(info.nbytes for info in held.values()),
        }
        index["weight_map"] = dict(sorted(files.items()))
        _write_json(out / INDEX, index)


def _write_json(path: Path, value: object) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _tensor_loss(weight: Weight, loss: Loss) -> TensorLoss:
    relative = sqrt(loss.difference / loss.value) if loss.value else 0.0
    return TensorLoss(weight.name, weight.shape, relative, loss.largest)
