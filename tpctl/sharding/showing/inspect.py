"""A shard folder looked at: described by its manifest, and held against its files and its source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from tpctl.arch.source_plan import as_held
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.errors import ShardFolderError, TpctlError
from tpctl.manifest.manifest import Manifest, describe_ranks
from tpctl.partition.plan import check_ranks
from tpctl.sharding.moving.contents import absent_ranks, stray_files
from tpctl.sharding.moving.opened import open_shards
from tpctl.sharding.moving.own_plan import own_plan
from tpctl.sharding.proving.compare import verify_source
from tpctl.sharding.proving.damage import load_manifest
from tpctl.sharding.proving.verify import verify_digests
from tpctl.sharding.showing.bands import copied_bytes
from tpctl.sharding.showing.meaning import Meaning, meanings
from tpctl.sharding.showing.report import ExtraReport, InspectReport, RankReport, Verified, tensor_report


def inspect_shards(
    folder: Path,
    *,
    ranks: Sequence[int] | None = None,
    verify: bool = False,
    source: Path | None = None,
    progress: Progress | None = None,
) -> InspectReport:
    """Describe the shard folder; sizes and headers of the files that are here are always checked.

    Args:
        ranks: the ranks to describe and verify; by default all that the manifest lists, of which those are verified
            whose files are here.
        verify: hash every byte and compare with the manifest.
        source: a checkpoint folder to compare every element with.

    Raises:
        ShardFolderError: the folder is incomplete, altered, describes another cut than its config's, or differs from
            ``source``; a rank that is to be verified is not here; or, with ``verify``, it holds weight files that are
            none of its own.
        PartitionError: a rank does not exist.
    """
    manifest = load_manifest(folder, verify=verify)
    chosen = tuple(manifest.shards) if ranks is None else check_ranks(ranks, manifest.tp_size)
    absent, strays = absent_ranks(folder, manifest), stray_files(folder, manifest)
    here = tuple(rank for rank in chosen if rank not in absent)
    open_shards(folder, manifest, here)
    verified = None
    if verify or source is not None:
        if lost := set(chosen) - set(here) if ranks is not None or not here else ():
            raise ShardFolderError(
                f"the files of {describe_ranks(lost)} are not in {folder}, so there is nothing to verify; choose a "
                "rank that is here, fetch them with `tpctl download --local-ranks` where the shards are on the Hub, or "
                "shard the model again"
            )
        # Only a folder that was fetched in part may lack the tensors that no rank needs.
        extra = not absent or manifest.extra is None or (folder / manifest.extra.parts[0].file).exists()
        hashed = 0
        if verify:
            try:
                hashed = verify_digests(folder, manifest, here, extra=extra, progress=progress)
            except ShardFolderError as error:
                raise _placed(error, folder, manifest, source) from None
        compared = 0
        if source is not None:
            compared = verify_source(folder, manifest, here, source, extra=extra, progress=progress)
        if strays and verify:
            raise ShardFolderError(
                f"{folder} holds {', '.join(strays)}, which its manifest does not list and an engine may load; "
                "everything else is in order, remove what does not belong there"
            )
        left_out = _left_out(manifest, here, absent, extra)
        verified = Verified(here, hashed, compared, None if source is None else str(source), left_out)
    own = own_plan(folder, manifest)
    meaning = meanings(as_held(own.config, own.tensors).blueprint)
    sizes = [shard.nbytes for shard in manifest.shards.values()]
    return InspectReport(
        folder=str(folder),
        source=manifest.source.id,
        revision=manifest.source.revision,
        model_type=manifest.model_type,
        tp_size=manifest.tp_size,
        dtype=manifest.dtype,
        compat=manifest.compat,
        expert_parallel=manifest.expert_parallel,
        even=manifest.even,
        source_shapes={name: info.shape for name, info in own.tensors.items()},
        ranks=tuple(_rank(manifest, rank, meaning) for rank in chosen),
        extra=_extra(manifest),
        absent=absent,
        strays=strays,
        imbalance=max(sizes) * len(sizes) / sum(sizes),
        replicated_bytes=copied_bytes(shard.tensors for shard in manifest.shards.values()),
        verified=verified,
    )


def _placed(error: ShardFolderError, folder: Path, manifest: Manifest, source: Path | None) -> ShardFolderError:
    """``error`` about a digest with the place that is damaged, which only the source can tell."""
    damaged = re.match(r"(.+) of rank (\d+) is damaged", str(error))
    if source is None or damaged is None:
        return error
    try:
        verify_source(folder, manifest, [int(damaged[2])], source, only=damaged[1])
    except ShardFolderError as place:
        if (differs := re.fullmatch(r".+ differs from its source (.+) at the source's (.+)", str(place))) is not None:
            rest = str(error).removeprefix(damaged[0])
            return ShardFolderError(f"{damaged[0]} at {differs[2]} of its source {differs[1]}{rest}")
    except TpctlError:  # of a source that is none
        pass
    return error


def _left_out(manifest: Manifest, done: Sequence[int], absent: Sequence[int], extra: bool) -> tuple[str, ...]:
    """What was not verified, by reason."""
    all_ranks = set(range(manifest.tp_size))
    reasons = {
        "not cut into this folder": all_ranks - set(manifest.shards),
        "files are not here": set(absent),
        "not asked for": set(manifest.shards) - set(absent) - set(done),
    }
    found = [f"{describe_ranks(ranks)} ({reason})" for reason, ranks in reasons.items() if ranks]
    if manifest.extra is not None and not extra:
        found.append(f"{manifest.extra.parts[0].file} (not here)")
    return tuple(found)


def _rank(manifest: Manifest, rank: int, meaning: Mapping[str, Meaning]) -> RankReport:
    shard = manifest.shard(rank)
    means = {name: meaning.get(name, Meaning()) for name in shard.tensors}
    tensors = tuple(
        tensor_report(name, tensor, shard.parts[tensor.part].file, tensor.dtype, means[name], tensor.fill)
        for name, tensor in shard.tensors.items()
    )
    return RankReport(
        rank=rank,
        files=tuple(part.file for part in shard.parts),
        nbytes=shard.nbytes,
        parameters=int(sum(prod(tensor.shape) * means[name].weights for name, tensor in shard.tensors.items())),
        tensors=tensors,
    )


def _extra(manifest: Manifest) -> tuple[ExtraReport, ...]:
    tensors = {} if manifest.extra is None else manifest.extra.tensors
    return tuple(
        ExtraReport(name, tensor.dtype, tensor.shape, tensor_nbytes(tensor.dtype, tensor.shape))
        for name, tensor in tensors.items()
    )
