"""Holds what a manifest says against the plan that follows from its own config and its source's headers.

A manifest that comes from anywhere may list any pieces of any tensors. What merge, reshard and inspect do with it is
right only where it describes the cut that tpctl makes of this model, so nothing else is taken.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpctl.arch.config import ModelConfig
from tpctl.arch.formats.beside import FILE, told_beside
from tpctl.arch.proven import ENGINES
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import second_copies, source_plan, unread
from tpctl.checkpoint.folder import INDEX, indexed_files
from tpctl.checkpoint.safetensors import FileTensor, Header, source_headers
from tpctl.errors import CheckpointError, PartitionError, ShardFolderError, TpctlError, shorten
from tpctl.json_file import read_object
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.partition.dtypes import dtype_after_cast
from tpctl.partition.plan import PartitionPlan
from tpctl.sharding.moving.expected import Expected
from tpctl.sharding.moving.parts import EXTRA_FILE, part_name

CONFIG = "config.json"


@dataclass(frozen=True)
class OwnPlan:
    """What a shard folder was cut from, and by which plan.

    Attributes:
        headers: of the source's files, by name.
        tensors: the source's, by name.
    """

    config: ModelConfig
    headers: Mapping[str, Header]
    tensors: Mapping[str, FileTensor]
    plan: PartitionPlan


def cutting_of(manifest: Manifest) -> Cutting:
    """How the folder was cut."""
    return Cutting(manifest.expert_parallel, manifest.even, manifest.compat, manifest.predicts)


def own_plan(folder: Path, manifest: Manifest) -> OwnPlan:
    """The plan of ``folder``'s own config, after checking that its ``manifest`` describes nothing else.

    Raises:
        ShardFolderError: the manifest contradicts itself or the plan.
        CheckpointError, UnsupportedModelError, PartitionError: the config is unsound, or cannot be cut so.
    """
    path = folder / MANIFEST
    try:
        headers = source_headers(manifest.source.files)
    except CheckpointError as error:
        raise _contradicts(path, str(error)) from None
    tensors: dict[str, FileTensor] = {}
    for file, header in headers.items():
        if twice := tensors.keys() & header.tensors.keys():
            raise _contradicts(path, f"the source's tensor {_short(min(twice))} is in {file} and in another file")
        tensors.update(header.tensors)
    try:
        config = ModelConfig.load(folder, cutting_of(manifest))
    except PartitionError as error:  # more groups of ranks than experts
        raise _contradicts(path, str(error)) from None
    try:
        plan = source_plan(config, tensors, manifest.tp_size)
        plan.check_source({name: info.shape for name, info in tensors.items()}, unread(config, tensors))
    except TpctlError as error:
        raise _contradicts(path, str(error)) from None
    if manifest.model_type != config.model_type:
        raise _contradicts(
            path, f"it is of a {_short(manifest.model_type)} model, config.json of a {config.model_type}"
        )
    if manifest.compat not in (None, *ENGINES):
        raise _contradicts(path, f"the engine {_short(manifest.compat or '')} is unknown")
    refuse_older_names(path, manifest, config)
    exact = {split.name for split in plan.splits if split.dtypes is not None}
    _check_shards(path, manifest, Expected.of(config, plan, manifest.compat), tensors, exact)
    _check_rest(path, manifest, second_copies(config, tensors), set(tensors) - set(plan.source_shapes), tensors)
    _check_index(path, manifest.source.index, headers)
    _check_names(path, manifest)
    if config.scheme is not None and FILE not in manifest.files and told_beside(folder, read_object(folder / CONFIG)):
        raise _contradicts(path, f"it does not list {FILE}, which alone says how the weights are stored")
    return OwnPlan(config, headers, tensors, plan)


def refuse_older_names(path: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Raise ``ShardFolderError`` for shards of an older tpctl, in which a tied head has another name than the engine
    that they are for gives it; ``config`` is as it would be cut now."""
    for rank in manifest.shards:
        held = manifest.tensors(rank)
        for own, theirs in config.blueprint.stored:
            if own in held and theirs not in held:
                raise ShardFolderError(
                    f"{path} was made by an older tpctl: the shards hold {own}, which {manifest.compat} only loads as "
                    f"{theirs}; shard the model again"
                )


def _check_shards(
    path: Path, manifest: Manifest, expected: Expected, tensors: Mapping[str, FileTensor], exact: Container[str]
) -> None:
    for rank, shard in manifest.shards.items():
        wanted = expected.shards[rank]
        if [part.file for part in shard.parts] != [part_name(rank, index) for index in range(len(shard.parts))]:
            raise _contradicts(path, f"the files of rank {rank} have other names than tpctl gives")
        if other := sorted(wanted.keys() ^ shard.tensors.keys()):
            which = "lacks" if other[0] in wanted else "has, beyond the model's,"
            raise _contradicts(path, f"rank {rank} {which} the tensor {_short(other[0])}")
        if list(wanted) != list(shard.tensors):
            raise _contradicts(path, f"the tensors of rank {rank} are in another order than the model's")
        for name, entry in shard.tensors.items():
            for field in expected.differing(rank, name, entry):
                verb = "are" if field == "pieces" else "is"
                raise _contradicts(path, f"the {field} of {name} of rank {rank} {verb} not what config.json leads to")
            target = None if name in exact else manifest.dtype
            sources = (tensors[source] for piece in entry.pieces for source in piece.tensors)
            dtypes = {dtype_after_cast(source.dtype, target) for source in sources} or {entry.dtype}
            if dtypes != {entry.dtype}:
                made = ", ".join(sorted(dtypes))
                raise _contradicts(path, f"{name} of rank {rank} is {entry.dtype}, but made of {made}")


def _check_rest(
    path: Path, manifest: Manifest, aliases: dict[str, str], rest: set[str], tensors: Mapping[str, FileTensor]
) -> None:
    """What of the source no rank holds: a tied head's second copy, and the tensors of the extra file."""
    if dict(manifest.source.aliases) != aliases:
        raise _contradicts(path, "its aliases are not the source's second copies of tensors")
    extra = {} if manifest.extra is None else manifest.extra.tensors
    if other := sorted(extra.keys() ^ (rest - aliases.keys())):
        raise _contradicts(path, f"{_short(other[0])} is in one of the source and the extra file only")
    for name, entry in extra.items():
        if (entry.dtype, entry.shape) != (tensors[name].dtype, tensors[name].shape):
            raise _contradicts(path, f"{_short(name)} of the extra file is not as in the source")


def _check_index(path: Path, index: str | None, headers: Mapping[str, Header]) -> None:
    if index is None:
        if len(headers) != 1:
            raise _contradicts(path, f"the source has {len(headers)} files and no {INDEX}")
        return
    try:
        listed = indexed_files(index, INDEX)
    except CheckpointError:
        listed = {}
    if listed.keys() != headers.keys() or any(not listed[name] <= headers[name].tensors.keys() for name in listed):
        raise _contradicts(path, f"the source's {INDEX} does not fit its files")


def _check_names(path: Path, manifest: Manifest) -> None:
    """What ``merge`` writes side by side must not have one name, and must be a checkpoint."""
    if CONFIG not in manifest.files:
        raise _contradicts(path, f"it lists no {CONFIG}")
    for file in manifest.source.files:
        if not file.name.endswith(".safetensors") or file.name in manifest.files:
            raise _contradicts(path, f"the source's weights cannot be in {_short(file.name)}")
    if INDEX in manifest.files:
        raise _contradicts(path, f"it lists the source's {INDEX} as a copied file")
    if manifest.extra is not None and manifest.extra.parts[0].file != EXTRA_FILE:
        raise _contradicts(path, "the extra file has another name than tpctl gives")


def _short(name: str) -> str:
    return shorten(name, 120)


def _contradicts(path: Path, why: str) -> ShardFolderError:
    return ShardFolderError(f"{path} contradicts itself: {why}; shard the model again")
