"""Shards with the shape of a known model and random weights, for speed that needs no download.

Weights are from a normal distribution, in bfloat16 or e4m3, or integers of any value, all cut from one random block
each, at shifting offsets: enough disorder to keep the arithmetic honest (zeros run faster than data) at the speed of
the disk. Norm weights are one, scales such that weights are of the usual size. The checkpoint that the shards say they
are of is never written, so a model takes its size on the disk once. There is no tokenizer: the workloads are token ids.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import DEFAULT_PART_SIZE, checked_source_plan
from tpctl.bench.shapes import shape_fields
from tpctl.checkpoint.cache import cache_root, locked
from tpctl.checkpoint.safetensors import FileTensor, TensorSpec, build_header
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import Manifest
from tpctl.manifest.records import Source, SourceFile
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import EACH, TensorSplit, source_shapes, tensor_names
from tpctl.sharding.cutting.recipe import make_recipe
from tpctl.sharding.cutting.writer import write_shards
from tpctl.sharding.moving.layout import Stored, pile, whole
from tpctl.sharding.proving.verified import remember_verified

_BLOCK = 32 << 20  # values in a random block
_SHIFTS = 4096  # where in a block a tensor may begin, in steps of 16 bytes
_SCALE = 0.02


def shape_config(shape: str, cutting: Cutting = Cutting()) -> ModelConfig:
    """What ``config.json`` of the named shape says.

    Raises:
        UsageError: no such shape.
    """
    return ModelConfig.from_dict(shape_fields(shape), cutting=cutting)


def synthetic_shards(shape: str, tp_size: int, expert_parallel: int = 1) -> ResolvedSource:
    """A shard folder of the named shape, made in the cache on first use.

    Raises:
        UsageError: no such shape.
        PartitionError: it cannot be cut into that many shards.
        OutputError: there is no room for it.
    """
    cutting = Cutting(expert_parallel)
    config = shape_config(shape, cutting)
    shapes = source_shapes([split for split in config.blueprint.splits() if not split.optional])
    plan = checked_source_plan(config, shapes, tp_size)
    groups = f"-ep{expert_parallel}" if expert_parallel > 1 else ""
    folder = _root() / f"{_name(shape)}-tp{tp_size}{groups}"
    with locked(folder.with_name(f".{folder.name}.lock")):
        try:
            Manifest.load(folder).check_files(folder)
        except ShardFolderError:
            _write(shape, config, plan, cutting, folder)
            remember_verified(folder)
    return ResolvedSource(folder, f"synthetic/{shape}", None)


def synthetic_folders(shape: str) -> list[Path]:
    """Those that the cache has of the named shape, at any size."""
    return [folder for folder in _root().glob(f"{_name(shape)}-tp*") if folder.is_dir()]


def _root() -> Path:
    return cache_root() / "synthetic"


def _name(shape: str) -> str:
    return shape.replace(":", "-first")


def _write(shape: str, config: ModelConfig, plan: PartitionPlan, cutting: Cutting, folder: Path) -> None:
    dtypes = {name: _dtype(split) for split in plan.splits for name in split.sources}
    header = build_header(TensorSpec(name, dtypes[name], shape) for name, shape in plan.source_shapes.items())
    tensors = header.tensors
    with _values(folder.parent, tensors) as values:
        config_file = values.folder / "config.json"
        fields = {"architectures": [config.family.architecture], **shape_fields(shape)}
        config_file.write_text(json.dumps(fields), encoding="utf-8")
        file = SourceFile("model.safetensors", header.file_size, header.text)
        recipe = make_recipe(
            config,
            plan,
            source=Source(f"synthetic/{shape}", None, (file,), None, {}),
            dtype=None,
            max_part_size=DEFAULT_PART_SIZE,
            ranks=None,
            compat=None,
            cutting=cutting,
            dtypes={split.name: dtypes[next(iter(split.sources))] for split in plan.splits},
            inputs={split.name: values.of(split, plan.stacks) for split in plan.splits},
            extra=(),
            small_files={config_file: None},
            identity=shape,
        )
        write_shards(recipe, folder, force=True, add=False, check=lambda: None, progress=None)


def _dtype(split: TensorSplit) -> str:
    """Of those that the sources may have; floats are bfloat16, scales mostly."""
    return "BF16" if split.dtypes is None or "BF16" in split.dtypes else split.dtypes[0]


class _Values:
    """Files that all tensors of a kind are read from, each as long as the longest of them."""

    def __init__(self, folder: Path, tensors: Mapping[str, FileTensor]) -> None:
        self.folder, self._tensors = folder, tensors
        self._numbers = {name: number for number, name in enumerate(tensors)}
        longest: dict[str, FileTensor] = {}
        for info in tensors.values():
            kind = _kind(info)
            if kind not in longest or info.nbytes > longest[kind].nbytes:
                longest[kind] = info
        random = _random_blocks()
        for kind, info in longest.items():
            block = random[kind] if kind in random else np.tile(_constant(info), _BLOCK // 4)
            left = info.nbytes + _SHIFTS * 16
            with (folder / kind).open("wb") as file:
                while left > 0:
                    file.write(block[:left].data)
                    left -= len(block)

    def of(self, split: TensorSplit, stacks: Container[str]) -> tuple[Stored, ...]:
        """What to read for a stored tensor, as of a checkpoint."""
        found = []
        for source in dict.fromkeys(part.source for part in split.parts):
            if split.stack is not None and EACH in source:
                found.append(pile(source, [self._place(name) for name in tensor_names(source, split.stack.count)]))
            else:
                found.append(whole(*self._place(source), stacked=source in stacks))
        return tuple(found)

    def _place(self, name: str) -> tuple[FileTensor, Path]:
        info = self._tensors[name]
        start = self._numbers[name] * 7919 % _SHIFTS * 16
        return info._replace(start=start, stop=start + info.nbytes), self.folder / _kind(info)


@contextmanager
def _values(beside: Path, tensors: Mapping[str, FileTensor]) -> Iterator[_Values]:
    """The files, until the end of the context."""
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=".values-", dir=beside))
    try:
        yield _Values(folder, tensors)
    finally:
        shutil.rmtree(folder)


Block = np.ndarray[tuple[int], np.dtype[np.uint8]]


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


def _kind(info: FileTensor) -> str:
    """The name of the file that a tensor is read from: its dtype, and what it holds if that is one value."""
    if info.dtype == "BF16" and len(info.shape) == 1 and "scale" not in info.name:
        return "ones"
    if "scale" not in info.name:
        return info.dtype
    grouped = len(info.shape) > 1 and info.shape[-1] > 1 and "inv" not in info.name
    return f"{info.dtype} scales{' of groups' if grouped else ''}"


def _constant(info: FileTensor) -> Block:
    """The bytes of one value: of a norm's weight, or of a scale that makes weights of the usual size from codes."""
    if "scale" in info.name and info.dtype == "U8":
        return np.array([127 - 7] * 4, np.uint8)  # 2^-7
    width = 1.0 if _kind(info) == "ones" else _SCALE / 4.6 if _kind(info).endswith("groups") else _SCALE
    value = np.array([width], np.float32).view(np.uint8)
    return value if info.dtype == "F32" else np.tile(value[2:], 2)
