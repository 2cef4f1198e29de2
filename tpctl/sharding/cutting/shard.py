"""Cuts a checkpoint folder into a shard folder, as bytes and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from shlex import quote

from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import (
    DEFAULT_PART_SIZE,
    check_scaled,
    check_text_only,
    checked_source_plan,
    second_copies,
    stored_dtype,
)
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.progress import Progress
from tpctl.errors import CheckpointError, ShardFolderError, UsageError
from tpctl.manifest.manifest import FORMAT_VERSION, MANIFEST
from tpctl.manifest.records import Source, SourceFile
from tpctl.partition.dtypes import DTYPES
from tpctl.sharding.cutting.constants import check_constants
from tpctl.sharding.cutting.recipe import make_recipe
from tpctl.sharding.cutting.writer import ShardReport, write_shards
from tpctl.sharding.moving.files import ByteCounter, Files, few_collections
from tpctl.sharding.moving.lanes import Move
from tpctl.sharding.moving.layout import copy_of
from tpctl.sharding.moving.sources import SourceTensors
from tpctl.sharding.moving.transfer import move_all
from tpctl.sharding.publishing.pending import refuse_existing


@few_collections()
def shard_checkpoint(
    source: Path,
    out: Path,
    tp_size: int,
    *,
    source_id: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    allow_overflow: bool = False,
    max_part_size: int = DEFAULT_PART_SIZE,
    ranks: Sequence[int] | None = None,
    compat: str | None = None,
    cutting: Cutting = Cutting(),
    text_only: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ShardReport:
    """Cut the checkpoint in ``source`` into ``tp_size`` shards and publish them as the folder ``out``.

    The config, the plan and every header are checked before a byte of data is read. Memory use does not
    depend on the model's size. ``out`` appears whole or not at all.

    Args:
        source_id: what the manifest names as the source; the folder's name by default.
        revision: the source's revision, for the manifest.
        dtype: cast float tensors to ``float32``, ``bfloat16`` or ``float16``; ``None`` or ``"auto"`` keeps
            them. Values that are NaN or infinite in the source stay so.
        allow_overflow: write values beyond the range of ``dtype`` as infinity.
        max_part_size: most tensor bytes in one file.
        ranks: the ranks to write; all by default.
        compat: ``vllm`` or ``sglang``: make a folder that this engine loads too.
        cutting: how experts are dealt, and where borders may be.
        text_only: of a model that also sees or hears, cut the text model; the rest is kept for ``merge``.
        force: replace ``out`` if it exists. Without it, ``ranks`` are added to a shard folder of the same cut; those
            that it holds already are left alone.

    Raises:
        CheckpointError, UnsupportedModelError: the checkpoint is unsound or unknown, or of a model that also sees, and
            ``text_only`` is not given.
        OverflowedError: a value is beyond the range of ``dtype``. Nothing of the run is kept.
        PartitionError: the model cannot be cut into ``tp_size`` shards.
        OutputError: ``out`` exists and is not to be replaced or added to, or cannot be written.
        UsageError: ``dtype`` is unknown.
    """
    if (source / MANIFEST).is_file():
        raise ShardFolderError(
            f"{source} is cut into shards already; use `tpctl reshard {quote(str(source))} --tp {tp_size} -o FOLDER`"
        )
    refuse_existing(out, force, [source], add=ranks is not None)
    target = _safetensors_dtype(dtype)
    folder = CheckpointFolder.open(source)  # before the config is read, so that a change meanwhile shows
    cutting = replace(cutting, engine=compat)
    config = ModelConfig.load(source, cutting)
    plan = checked_source_plan(config, folder.shapes, tp_size)
    check_constants(config, folder)
    check_text_only(config, folder.tensors, text_only)
    held = {name: info.dtype for name, (_, info) in folder.tensors.items()}
    found = {split.name: {source: held[source] for source in split.sources} for split in plan.splits}
    check_scaled(config, plan.splits, found)
    dtypes = {split.name: stored_dtype(split, found[split.name], target) for split in plan.splits}
    if all(set(sources.values()) == {dtypes[name]} for name, sources in found.items()):
        target = None
    tensors = SourceTensors(folder, plan)
    aliases = _aliases(second_copies(config, held), tensors)
    unread = sorted(held.keys() - plan.source_shapes.keys() - aliases.keys())
    recipe = make_recipe(
        config,
        plan,
        source=Source(
            source_id or source.resolve().name,
            revision,
            tuple(SourceFile(f.name, f.size, f.header.text, f.sha256) for f in folder.files),
            folder.index,
            aliases,
        ),
        dtype=target,
        max_part_size=max_part_size,
        ranks=ranks,
        compat=compat,
        cutting=cutting,
        dtypes=dtypes,
        inputs={split.name: tensors.of(split) for split in plan.splits},
        extra=[tensors[name] for name in unread],
        small_files=dict.fromkeys(folder.small_files()),
        identity=_identity(folder, source_id, revision, allow_overflow),
        may_overflow=allow_overflow,
    )
    check = folder.check_unchanged
    return write_shards(recipe, out, force=force, add=ranks is not None, check=check, progress=progress)


def _safetensors_dtype(dtype: str | None) -> str | None:
    if dtype is None or dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _aliases(copies: dict[str, str], tensors: SourceTensors) -> dict[str, str]:
    """``copies``, of a tied head that is stored a second time, after checking that it equals the embedding."""
    for name, original in copies.items():
        head, embedding = tensors[name], tensors[original]
        differ = CheckpointError(
            f"config.json ties the embeddings, but {name} differs from {original}; "
            "set tie_word_embeddings to false if the head is its own"
        )
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            raise differ
        try:
            with Files() as files:
                move = Move((embedding,), (copy_of(head, original),))
                move_all([move], files, ByteCounter(0, "", None), compare=True)
        except ShardFolderError:
            raise differ from None
    return copies


def _identity(folder: CheckpointFolder, source_id: str | None, revision: str | None, allow_overflow: bool) -> str:
    files = [(f.name, f.stamp, f.sha256, sha256(f.header.text.encode()).hexdigest()) for f in folder.files]
    return sha256(repr([FORMAT_VERSION, source_id, revision, files, allow_overflow]).encode()).hexdigest()
