"""The shard folder's manifest, ``tpctl.json``: what the shards were made from, how, and a digest of everything.

The file has one canonical text for a given content, and carries the SHA-256 of it, so that any changed byte of the
manifest itself is found when it is loaded. Tensor bytes and copied files are covered by BLAKE3 digests; headers of
part files, small and read by everyone, by SHA-256. Nothing in it depends on when or where it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from stat import S_ISFIFO, S_ISREG
from typing import Any, TypeVar

from tpctl.errors import ShardFolderError
from tpctl.manifest.file import MANIFEST, parse_manifest, read_manifest
from tpctl.manifest.records import (
    LONGEST_ID,
    CopiedFile,
    ManifestTensor,
    Part,
    Shard,
    Source,
    SourceFile,
    digest,
    flag,
    natural,
    one_of,
    plain_name,
    shard_from_dict,
    shard_to_dict,
    text,
)
from tpctl.partition.dtypes import CASTS

__all__ = ["DIGEST", "FORMAT_VERSION", "MANIFEST", "MOST_RANKS", "Manifest", "describe_ranks", "rank_list"]

FORMAT_VERSION = 1
DIGEST = "blake3"

MOST_RANKS = 100_000
"""The largest tensor-parallel size; no model has as many query heads."""

T = TypeVar("T")


PREDICTOR = "mtp."
"""Of the names of what predicts one token more (``arch.predictor``)."""


@dataclass(frozen=True)
class Manifest:
    """A shard folder's contents. ``shards`` maps rank to shard: all of them, or those that ``--ranks`` named.

    ``dtype`` is the safetensors dtype that float tensors were cast to, ``None`` where they are as in the
    source. ``extra`` holds tensors of the source that no rank needs but ``merge`` gives back. ``expert_parallel`` is
    the number of groups of ranks that whole experts were dealt to, ``even`` whether borders may divide a scale's block.
    """

    source: Source
    tp_size: int
    model_type: str
    dtype: str | None
    max_part_size: int
    compat: str | None
    shards: Mapping[int, Shard]
    extra: Shard | None
    files: Mapping[str, CopiedFile]
    expert_parallel: int = 1
    even: bool = False

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder``'s manifest and check it against its own digest.

        Raises:
            ShardFolderError: it is missing, altered, or of a format version that this tpctl does not read.
        """
        return cls.parse(read_manifest(folder), folder / MANIFEST)

    @classmethod
    def parse(cls, raw: bytes, path: Path) -> Manifest:
        """The manifest whose file at ``path`` holds ``raw``; errors as ``load``."""
        found, value = parse_manifest(raw, path)
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION and isinstance(version, int):
            raise ShardFolderError(
                f"{path} has format version {version}, this tpctl reads version {FORMAT_VERSION}; shard the model again"
            )
        altered = ShardFolderError(f"{path} was altered after it was written; shard the model again")
        try:
            manifest = _from_dict(value)
            # The canonical text ends with its own digest, so that equal texts have the right one.
            intact = manifest.text() == found
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            intact = False
        if not intact:
            raise altered
        return manifest

    def text(self) -> str:
        """The file's canonical text."""
        text = _text(_to_dict(self))
        return f'{text.removesuffix(_END)},\n "sha256":"{_sha256(text)}"{_END}'

    @property
    def predicts(self) -> bool:
        """Whether the ranks hold a layer that predicts one token more; an older tpctl has left it out."""
        return any(name.startswith(PREDICTOR) for shard in self.shards.values() for name in shard.tensors)

    def shard(self, rank: int) -> Shard:
        """``rank``'s shard.

        Raises:
            ShardFolderError: the folder does not hold it.
        """
        if rank not in self.shards:
            raise ShardFolderError(
                f"the folder holds no shard of rank {rank}: it has {describe_ranks(self.shards)} of tp {self.tp_size}"
            )
        return self.shards[rank]

    def rank_files(self, rank: int) -> list[str]:
        """The names of ``rank``'s part files, in order; errors as ``shard``."""
        return [part.file for part in self.shard(rank).parts]

    def tensors(self, rank: int) -> Mapping[str, ManifestTensor]:
        """``rank``'s tensors by name; errors as ``shard``."""
        return self.shard(rank).tensors

    def check_tp(self, tp_size: int, folder: Path) -> None:
        """Raise ``ShardFolderError`` unless ``folder`` was cut for ``tp_size`` ranks."""
        if tp_size != self.tp_size:
            raise ShardFolderError(
                f"{folder} is cut for tp {self.tp_size}, but tp {tp_size} is asked for; "
                f"use --tp {self.tp_size}, or make a new one: `tpctl reshard {quote(str(folder))} "
                f"--tp {tp_size} -o FOLDER`"
            )

    def check_files(self, folder: Path, ranks: Iterable[int] | None = None) -> None:
        """Check the part files of ``ranks`` (all that are listed, if ``None``) by size and header, without
        hashing data.

        Raises:
            ShardFolderError: a file is missing, has another size, or another header.
        """
        shards = [self.shard(rank) for rank in (self.shards if ranks is None else ranks)]
        for shard in shards:
            for part in shard.parts:
                _check_part(folder / part.file, part)


def describe_ranks(ranks: Iterable[int]) -> str:
    """``"rank 3"``, ``"ranks 0-3"`` or ``"ranks 0, 2-3"``."""
    ranks = list(ranks)
    return f"rank{'' if len(ranks) == 1 else 's'} {rank_list(ranks).replace(',', ', ') or 'none'}"


def rank_list(ranks: Iterable[int]) -> str:
    """``ranks`` as ``--ranks`` takes them: ``"0,2-3"``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _check_part(path: Path, part: Part) -> None:
    again = "shard the model again, or copy the file again"
    try:
        stat = path.stat()
        if S_ISREG(stat.st_mode) and stat.st_size != part.size:  # a folder fails below, a pipe would wait for ever
            raise ShardFolderError(f"{path} has {stat.st_size} bytes, but {part.size} by the manifest; {again}")
        if S_ISFIFO(stat.st_mode):
            raise ShardFolderError(f"{path} is a pipe, not the file of {part.size} bytes of the manifest; {again}")
        with path.open("rb") as file:
            header = file.read(part.header_size)
    except FileNotFoundError:
        raise ShardFolderError(f"{path} is missing ({part.size} bytes by the manifest); {again}") from None
    except OSError as error:
        raise ShardFolderError(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(header).hexdigest() != part.header_sha256:
        raise ShardFolderError(f"{path} has another header than the manifest says; {again}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


_END = "\n}\n"
"""How every text ends; the digest of the rest is put before it."""


def _text(value: Mapping[str, Any]) -> str:
    """Canonical JSON: one line for each tensor, so that the file can be read and compared by people."""
    return "".join(_fragments(value, 0)) + "\n"


def _fragments(value: Any, level: int, depth: int = 4) -> Iterator[str]:
    """What the text of ``value`` is made of: it may be long, and is put together once."""
    if not isinstance(value, dict | list) or not value or level == depth:
        yield _encode(value)
        return
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    before = f"{opening}\n" + " " * (level + 1)
    for item in value:
        yield before
        if isinstance(value, dict):
            yield _encode(item) + ":"
            item = value[item]
        yield from _fragments(item, level + 1)
        before = ",\n" + " " * (level + 1)
    yield "\n" + " " * level + closing


def _to_dict(manifest: Manifest) -> dict[str, Any]:
    source = manifest.source
    return {
        "format_version": FORMAT_VERSION,
        "digest": DIGEST,
        "model_type": manifest.model_type,
        "tp_size": manifest.tp_size,
        "dtype": manifest.dtype,
        "max_part_size": manifest.max_part_size,
        "compat": manifest.compat,
        **({} if manifest.expert_parallel == 1 else {"expert_parallel": manifest.expert_parallel}),
        **({"even": True} if manifest.even else {}),
        "source": {
            "id": source.id,
            "revision": source.revision,
            "files": [
                {"name": file.name, "size": file.size, "sha256": file.sha256, "header": file.header}
                for file in source.files
            ],
            "index": source.index,
            "aliases": dict(sorted(source.aliases.items())),
        },
        "files": {name: {"size": file.size, "digest": file.digest} for name, file in sorted(manifest.files.items())},
        "shards": {str(rank): shard_to_dict(shard) for rank, shard in sorted(manifest.shards.items())},
        "extra": None if manifest.extra is None else shard_to_dict(manifest.extra),
    }


def _from_dict(value: Mapping[str, Any]) -> Manifest:
    """The inverse of ``_to_dict``; errors as ``shard_from_dict``. A right digest does not make a manifest trusted."""
    source = value["source"]
    tp_size = natural(value["tp_size"], least=1, most=MOST_RANKS)
    shards = {natural(int(rank), most=tp_size - 1): shard_from_dict(shard) for rank, shard in value["shards"].items()}
    if len({frozenset(shard.tensors) for shard in shards.values()}) != 1:
        raise ValueError("the ranks hold different tensors, or there are none")
    manifest = Manifest(
        source=Source(
            text(source["id"], LONGEST_ID),
            _optional(text, source["revision"]),
            tuple(
                SourceFile(
                    plain_name(f["name"]), natural(f["size"]), text(f["header"], None), _optional(digest, f["sha256"])
                )
                for f in source["files"]
            ),
            _optional(partial(text, longest=None), source["index"]),
            {text(name, None): text(other, None) for name, other in source["aliases"].items()},
        ),
        tp_size=tp_size,
        model_type=text(value["model_type"]),
        dtype=_optional(partial(one_of, CASTS), value["dtype"]),
        max_part_size=natural(value["max_part_size"], least=1),
        compat=_optional(text, value["compat"]),
        shards=shards,
        extra=_optional(shard_from_dict, value["extra"]),
        files={
            plain_name(name): CopiedFile(natural(file["size"]), digest(file["digest"]))
            for name, file in value["files"].items()
        },
        expert_parallel=natural(value.get("expert_parallel", 1), least=1, most=tp_size),
        even=flag(value.get("even", False)),
    )
    if manifest.extra is not None and len(manifest.extra.parts) != 1:
        raise ValueError("tensors that no rank needs are in one file")
    names = [MANIFEST, *manifest.files]
    names += [part.file for shard in (*shards.values(), *filter(None, [manifest.extra])) for part in shard.parts]
    for one in (names, [file.name for file in manifest.source.files]):
        if len(set(one)) != len(one):
            raise ValueError("a file is listed twice")
    return manifest


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)
