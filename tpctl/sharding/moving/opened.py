"""A shard folder opened for reading: every header and size held against its manifest, no data touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from stat import S_ISDIR

from tpctl.checkpoint.safetensors import FileTensor, Header, TensorSpec, build_header
from tpctl.errors import CheckpointError, ShardFolderError
from tpctl.manifest.manifest import Manifest
from tpctl.manifest.records import Shard
from tpctl.sharding.moving.copied import hash_file
from tpctl.sharding.moving.layout import Stored, in_shard, whole

AGAIN = "shard the model again, or copy the file again"
_LET = "let this user read it (`chmod u+r`, `chown`)"


def _mend(error: BaseException | None) -> str:
    """What helps where a file cannot be read: a new one helps nobody who may not read it either."""
    return _LET if isinstance(error, PermissionError) else AGAIN


def open_shards(folder: Path, manifest: Manifest, ranks: Sequence[int]) -> dict[str, tuple[Stored, ...]]:
    """Every stored tensor of ``ranks`` by name, one entry a rank, after checking sizes and headers.

    Raises:
        ShardFolderError: a part file is missing, truncated, or not the one that the manifest describes.
    """
    found: dict[str, list[Stored]] = {}
    for rank in ranks:
        tensors = manifest.tensors(rank)
        for name, (info, path) in tensor_infos(folder, manifest, rank).items():
            tensor = tensors[name]
            found.setdefault(name, []).append(
                in_shard(
                    info,
                    tensor.pieces,
                    path,
                    rank,
                    stacked=tensor.stacked,
                    fill=tensor.fill,
                    digest=tensor.digest,
                )
            )
    return {name: tuple(held) for name, held in found.items()}


def tensor_infos(folder: Path, manifest: Manifest, rank: int) -> dict[str, tuple[FileTensor, Path]]:
    """The header entry and the file of every tensor of ``rank``; errors as ``open_shards``."""
    shard = manifest.shard(rank)
    headers = _headers(folder, shard, f"rank {rank}")
    return {
        name: (headers[tensor.part][0].tensors[name], headers[tensor.part][1]) for name, tensor in shard.tensors.items()
    }


def open_extra(folder: Path, manifest: Manifest) -> tuple[Stored, ...]:
    """The tensors that no rank needs; errors as ``open_shards``."""
    if manifest.extra is None:
        return ()
    [(header, path)] = _headers(folder, manifest.extra, "the extra file")
    tensors = manifest.extra.tensors
    return tuple(whole(header.tensors[name], path, digest=tensors[name].digest) for name in tensors)


def check_copied(folder: Path, manifest: Manifest) -> int:
    """Hash the copied files; their bytes. Raises ``ShardFolderError`` if one is missing or altered."""
    total = 0
    for name, wanted in manifest.files.items():
        try:
            found = hash_file(folder / name, wanted.size)
        except CheckpointError as error:
            raise ShardFolderError(f"{error}; {_mend(error.__context__)}") from None
        if found != wanted:
            raise ShardFolderError(f"{folder / name} was altered after it was copied; {AGAIN}")
        total += found.size
    return total


def _headers(folder: Path, shard: Shard, owner: str) -> list[tuple[Header, Path]]:
    """The part files' headers, rebuilt from the manifest and compared with the files byte for byte."""
    found = []
    held: list[list[TensorSpec]] = [[] for _ in shard.parts]
    for name, tensor in shard.tensors.items():
        held[tensor.part].append(TensorSpec(name, tensor.dtype, tensor.shape))
    for part, tensors in zip(shard.parts, held, strict=True):
        path = folder / part.file
        contradiction = ShardFolderError(f"the manifest of {folder} contradicts itself about {part.file}; {AGAIN}")
        try:
            header = build_header(tensors)
        except CheckpointError:  # elements that do not fill whole bytes
            raise contradiction from None
        if (header.size, sha256(header.raw).hexdigest()) != (part.header_size, part.header_sha256):
            raise contradiction
        if header.file_size != part.size:
            raise contradiction
        try:
            stat = path.stat()
            if stat.st_size != part.size and not S_ISDIR(stat.st_mode):  # a pipe too, whose reading would not end
                raise ShardFolderError(
                    f"{path} ({owner}) has {stat.st_size} bytes, but {part.size} by the manifest; {AGAIN}"
                )
            with path.open("rb") as file:
                raw = file.read(header.size)
        except OSError as error:
            raise ShardFolderError(f"{path} ({owner}) cannot be read: {error.strerror}; {_mend(error)}") from None
        if raw != header.raw:
            raise ShardFolderError(f"the header of {path} is damaged at {_entry_at(header, raw)} of {owner}; {AGAIN}")
        found.append((header, path))
    return found


def _entry_at(header: Header, raw: bytes) -> str:
    """The tensor in whose header entry the first differing byte lies."""
    place = next(i for i, (one, other) in enumerate(zip(header.raw, raw, strict=True)) if one != other)
    starts = {header.raw.index(json.dumps(n, ensure_ascii=False).encode() + b":{"): n for n in header.tensors}
    before = [start for start in starts if start <= place]
    return starts[max(before) if before else min(starts)]
