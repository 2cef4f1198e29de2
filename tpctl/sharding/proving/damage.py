"""Where a manifest was damaged: its own SHA-256 says only that it was.

Two ways lead to the place. A flipped bit is found by undoing it: the flip that makes the digest right again is the one
that happened. And what a tensor's line says (these lines are most of the file) is also written elsewhere: in the header
of its part file, in its bytes, and in the plan that follows from ``config.json``. The line that contradicts them is
the damaged one, since the manifest is known to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import source_plan
from tpctl.checkpoint.safetensors import Header, read_header, source_headers
from tpctl.errors import CheckpointError, ShardFolderError, TpctlError
from tpctl.manifest.file import read_manifest
from tpctl.manifest.manifest import MANIFEST, PREDICTOR, Manifest
from tpctl.manifest.records import (
    CopiedFile,
    ManifestTensor,
    Part,
    SourceFile,
    parts_from_list,
    plain_name,
    tensor_from_dict,
)
from tpctl.sharding.moving.copied import hash_file
from tpctl.sharding.moving.expected import Expected
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.layout import whole
from tpctl.sharding.moving.transfer import hash_all
from tpctl.sharding.proving.flips import Budget, path_of_line, undo_flip, unreadable_line

MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""How reading an entry fails that ``manifest.records`` does not take."""


def load_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """``Manifest.load``, whose error also says what in the manifest is damaged, as far as that can be told.

    Args:
        verify: read the tensors too, to tell a damaged digest.

    Raises:
        ShardFolderError: as ``Manifest.load``.
    """
    raw = read_manifest(folder)
    try:
        return Manifest.parse(raw, folder / MANIFEST)
    except ShardFolderError as error:
        failure = error.with_traceback(None)  # which would keep what was parsed
    try:
        place = _find(folder, raw, verify)
        if place is None and verify and _is_json(raw):
            place = "everything that other files tell too does fit, so it is in what only the manifest says"
    except Exception:  # wrong in a way that nobody foresaw, or nested too deeply
        place = None
    if place is None:
        raise failure
    raise ShardFolderError(
        f"{folder / MANIFEST} was altered after it was written: {place}; shard the model again, or copy it again"
    )


def _is_json(raw: bytes) -> bool:
    """Whether ``raw`` is a manifest of this version, as far as that shows."""
    return unreadable_line(raw) is None and b'"format_version":1,' in raw


def _find(folder: Path, raw: bytes, read: bool) -> str | None:
    """What in the altered manifest ``raw`` of ``folder`` is damaged; ``None`` if that cannot be told."""
    lines = raw.split(b"\n")
    short = [n for n, line in enumerate(lines) if b'":{"part":' not in line and len(line) < 2000]
    top = [n for n in short if lines[n][:2] != b"  "]
    budget = Budget()
    broken = unreadable_line(raw)
    if broken is not None:  # the flip is there or next to it: a bracket shows in the following line only
        near = range(max(0, broken - 1), min(broken + 2, len(lines)))
        return undo_flip(raw, near, budget) or f"it cannot be read at {path_of_line(lines, broken)} (line {broken + 1})"
    if b'"format_version":1,' not in raw:  # another version, unless a bit says so by mistake
        return undo_flip(raw, top, budget)
    return (
        # Sizes that the whole plan hangs on come first: with a wrong one all tensors would look wrong.
        undo_flip(raw, top, budget)
        or _contradiction(folder, json.loads(raw), read)
        or undo_flip(raw, sorted(range(len(lines)), key=lambda n: len(lines[n])), budget)
    )


def _contradiction(folder: Path, value: Any, read: bool) -> str | None:
    """The first entry of the manifest's JSON that is malformed, or contradicts the folder's other files."""
    try:
        found: list[tuple[str, int | None, Any]] = []
        found += [(f"rank {int(rank)}", int(rank), shard) for rank, shard in value["shards"].items()]
        found += [("the extra file", None, value["extra"])] if value["extra"] else []
        expected = _expected(folder, value)
        for owner, rank, entries in found:
            if expected is not None and rank is not None and not 0 <= rank < len(expected.shards):
                return f"there is no {owner} at tp {len(expected.shards)}"
            for place in _contradictions(folder, owner, rank, entries, expected, read):
                return place
        for name, file in value["files"].items():
            if _altered(folder / plain_name(name), file):
                return f"size or digest of {name} do not fit the file"
    except (*MALFORMED, TpctlError):
        return None
    return None


def _expected(folder: Path, value: Mapping[str, Any]) -> Expected | None:
    """What the plan of the folder's own config says, if there is one."""
    try:
        files = [SourceFile(file["name"], file["size"], file["header"]) for file in value["source"]["files"]]
        names = {name for header in source_headers(files).values() for name in header.tensors}
        predicts = any(name.startswith(PREDICTOR) for shard in value["shards"].values() for name in shard["tensors"])
        cutting = Cutting(value.get("expert_parallel", 1), value.get("even", False), value["compat"], predicts)
        config = ModelConfig.load(folder, cutting)
        plan = source_plan(config, names, value["tp_size"])
        return Expected.of(config, plan, value["compat"])
    except TpctlError:
        return None


def _contradictions(
    folder: Path, owner: str, rank: int | None, entries: Mapping[str, Any], expected: Expected | None, read: bool
) -> Iterator[str]:
    """What of a shard's entries is malformed, or contradicts its part files or ``expected``."""
    try:
        parts = parts_from_list(entries["parts"])
    except MALFORMED:
        yield f"the list of part files of {owner} is malformed"
        return
    headers = [_header(folder, part) for part in parts]
    for part, header in zip(parts, headers, strict=True):
        if header is not None and _entry(part.file, header) != part:
            yield f"size or header of {part.file} ({owner}) do not fit the file"
    names = {name: n for n, header in enumerate(headers) if header is not None for name in header.tensors}
    wanted: Mapping[str, Any] = names
    if expected is not None and rank is not None:
        wanted = expected.shards[rank]
    if not wanted:  # neither files nor a plan
        wanted = entries["tensors"]
    for name in wanted:
        if name not in entries["tensors"]:
            yield f"{name} of {owner} is missing"
    for name, fields in entries["tensors"].items():
        entry = _entry_of(fields, len(parts))
        if entry is None or name not in wanted:
            why = "is malformed" if entry is None else "belongs to no tensor of the model"
            yield f"the entry of {name} of {owner} {why}"
            continue
        differ = expected.differing(rank, name, entry) if expected is not None and rank is not None else []
        if (header := headers[entry.part]) is not None:
            info = header.tensors.get(name)
            differ += ["part"] if info is None else []
            differ += ["dtype"] if info is not None and info.dtype != entry.dtype else []
        for field in differ:
            yield f"the {field} of {name} of {owner} {'do' if field == 'pieces' else 'does'} not fit"
        if header is not None and read and not differ:
            stored = whole(header.tensors[name], folder / parts[entry.part].file, rank, entry.digest)
            try:
                with Files() as files:
                    hash_all([stored], files, ByteCounter(stored.nbytes, "", None))
            except ShardFolderError:
                yield f"the digest of {name} of {owner} is not that of its bytes"


def _entry_of(fields: Any, num_parts: int) -> ManifestTensor | None:
    try:
        return tensor_from_dict(fields, num_parts)
    except MALFORMED:
        return None


def _header(folder: Path, part: Part) -> Header | None:
    """The header of a part file that is here."""
    try:
        return read_header(folder / part.file)
    except TpctlError:
        return None


def _entry(file: str, header: Header) -> Part:
    return Part(file, header.file_size, header.size, sha256(header.raw).hexdigest())


def _altered(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return hash_file(path, entry["size"]) != CopiedFile(entry["size"], entry["digest"])
    except CheckpointError:
        return False
