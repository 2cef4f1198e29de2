"""Quantised models as a cache: made when a command first needs them, found again by what they were made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tpctl.arch.formats.beside import is_quantised
from tpctl.checkpoint.cache import build_once, cache_root, file_name
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.sources import Notify, ResolvedSource, made_of, quantised_id, to_stderr
from tpctl.errors import CheckpointError, ShardFolderError, SourceError
from tpctl.manifest.manifest import MANIFEST
from tpctl.quantizing.linears import cut_block
from tpctl.quantizing.schemes import FORMAT_RELEASE, SCHEMES, Method
from tpctl.quantizing.writer import QuantizationReport, TensorLoss, linears_of, quantise_checkpoint
from tpctl.sharding.moving.copied import hash_file

VERSION = 2
"""Raised when a model is quantised to something else than before, so that the cache's old folders are not used."""

_REPORT = "report.json"


@dataclass(frozen=True)
class QuantisedSource:
    """A quantised model in the cache: its folder, and what it has lost.

    ``source.id`` is the original's with the method, ``org/name (fp8 by tpctl)``; ``source.revision`` is the original's.
    """

    source: ResolvedSource
    report: QuantizationReport


def ensure_quantised(
    source: ResolvedSource, method: Method, *, progress: Progress | None = None, notify: Notify = to_stderr
) -> QuantisedSource:
    """``source`` quantised by ``method``, from the cache, or made there. Two processes that ask at once make it once.

    Args:
        notify: told that it is made, and where other engines will not run it.

    Raises:
        UnsupportedModelError: ``source`` is quantised already.
        ShardFolderError: it is cut into shards.
        CheckpointError: it cannot be quantised; the message names the tensor.
        SourceError: the cache cannot be written, or its disk is full.
    """
    if (source.folder / MANIFEST).is_file():
        raise ShardFolderError(
            f"{source.folder} is cut into shards already; quantise the model itself: `tpctl shard MODEL --tp N "
            f"--quantize {method}`"
        )
    checkpoint = CheckpointFolder.open(source.folder)
    chosen, _ = linears_of(checkpoint, method)
    if (cut := cut_block(chosen, SCHEMES[method])) is not None:
        notify(
            f"{cut.name} has {cut.shape[1]} columns, which blocks of {SCHEMES[method].columns} do not divide: "
            "transformers and vLLM will not run that; --quantize fp8 has no blocks"
        )
    name = f"{file_name(Path(source.id).name)}-{method}"

    def build(entry: Path) -> None:
        notify(f"quantising {source.id} to {method} (once)")
        (entry / name).mkdir()
        report = quantise_checkpoint(checkpoint, entry / name, method, progress=progress)
        files = {path.name: asdict(hash_file(path, path.stat().st_size)) for path in sorted((entry / name).iterdir())}
        (entry / _REPORT).write_text(json.dumps({**asdict(report), "files": files}), encoding="utf-8")

    entry = build_once(cache_root() / "models" / f"{name}-{_key(source, checkpoint, method)}", build)
    kept = _checked(entry, entry / name)
    tensors = tuple(TensorLoss(**{**one, "shape": tuple(one["shape"])}) for one in kept["tensors"])
    return QuantisedSource(
        ResolvedSource(entry / name, quantised_id(source.id, method), source.revision),
        QuantizationReport(**{**kept, "tensors": tensors}),
    )


def as_cut(source: ResolvedSource, cut_from: str, *, progress: Progress | None = None) -> ResolvedSource:
    """``source`` as shards of ``cut_from``, the id in their manifest, can be compared with it: where that was quantised
    for them and ``source`` is not, quantised likewise, which gives the same bytes. Raises as ``ensure_quantised``."""
    made = made_of(cut_from)
    if made is None or made[1] not in list(Method) or (source.folder / MANIFEST).is_file():
        return source
    if is_quantised(source.folder):
        return source
    return ensure_quantised(source, Method(made[1]), progress=progress).source


def _checked(entry: Path, folder: Path) -> dict[str, Any]:
    """The report of what is in ``folder``, after hashing that.

    Raises:
        SourceError: a file is missing, or not as it was made.
    """
    damaged = SourceError(f"{entry} is damaged, tpctl made it otherwise; remove that folder, and run the command again")
    try:
        kept: dict[str, Any] = json.loads((entry / _REPORT).read_text(encoding="utf-8"))
        files = kept.pop("files")
        if any(asdict(hash_file(folder / name, one["size"])) != one for name, one in files.items()):
            raise damaged
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        raise damaged from None
    return kept


def _key(source: ResolvedSource, checkpoint: CheckpointFolder, method: Method) -> str:
    """Changes whenever a model made earlier would differ from the one made now."""
    files = [(file.name, file.size, file.mtime_ns) for file in checkpoint.files]
    files += [(path.name, stamp.size, stamp.mtime_ns) for path, stamp in checkpoint.beside.items()]
    # A revision pins the content; a local folder is told from another of the same name by its place.
    place = source.revision or str(source.folder.resolve())
    text = repr([VERSION, FORMAT_RELEASE, source.id, place, files, str(method)])
    return sha256(text.encode()).hexdigest()[:12]
