"""Cuts a shard folder anew for another number of ranks, from the shards alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from shlex import quote

from tpctl.arch.compat import check_compat
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import source_plan
from tpctl.checkpoint.outputs import refuse_overlap
from tpctl.checkpoint.progress import Progress
from tpctl.errors import PartitionError, UnsupportedModelError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.merge import require_all_ranks
from tpctl.sharding.cutting.recipe import make_recipe
from tpctl.sharding.cutting.writer import ShardReport, write_shards
from tpctl.sharding.moving.files import few_collections
from tpctl.sharding.moving.opened import check_copied, open_extra, open_shards
from tpctl.sharding.moving.own_plan import own_plan
from tpctl.sharding.publishing.pending import refuse_existing

NO_ENGINE = "none"
"""In place of an engine's name: no other engine shall load the folder."""


def reshard_command(folder: Path, manifest: Manifest, tp_size: int, expert_parallel: int | None = None) -> str:
    """The command that cuts ``folder`` for ``tp_size`` ranks: for its engine if that loads the result, else for none.

    Args:
        expert_parallel: groups of ranks that experts are dealt to; ``None``: as in ``folder``.

    Raises:
        TpctlError: it would be refused.
    """
    require_all_ranks(folder, manifest)
    own = own_plan(folder, manifest)
    groups = expert_parallel or manifest.expert_parallel
    config = ModelConfig.load(folder, replace(own.config.cutting, expert_parallel=groups))
    plan = source_plan(config, own.tensors, tp_size)
    options = f" --tp {tp_size}" if expert_parallel is None else f" --tp {tp_size} --ep {groups}"
    if manifest.compat is not None:
        try:
            check_compat(manifest.compat, config, plan, () if manifest.extra is None else manifest.extra.tensors)
        except (PartitionError, UnsupportedModelError):
            options += f" --compat {NO_ENGINE}"
    return f"tpctl reshard {quote(str(folder))}{options} -o FOLDER"


@few_collections()
def reshard(
    folder: Path,
    out: Path,
    tp_size: int,
    *,
    max_part_size: int | None = None,
    ranks: Sequence[int] | None = None,
    compat: str | None = None,
    cutting: Cutting | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ShardReport:
    """Cut the shards in ``folder`` for ``tp_size`` ranks and publish them as ``out``.

    The result is byte for byte what ``shard_checkpoint`` makes of the source at ``tp_size``; where ``folder`` has left
    out a layer that predicts more tokens, so does the result. Every byte read is checked against its digest.

    Args:
        max_part_size: most tensor bytes in one file; as in ``folder`` by default.
        cutting: how experts are dealt, and where borders may be; as in ``folder`` by default.
        compat: the engine that shall load it too, or ``"none"``; as in ``folder`` by default.
        ranks, force: as in ``shard_checkpoint``.

    Raises:
        ShardFolderError: ``folder`` lacks a rank, is incomplete or damaged.
        PartitionError: the model cannot be cut into ``tp_size`` shards, or not so that the engine loads them.
        UnsupportedModelError: nobody has proven that the engine loads such a model.
        OutputError: ``out`` exists and ``force`` is not given, is not apart from ``folder``, or cannot be written.
    """
    refuse_overlap(out, folder)
    refuse_existing(out, force, add=ranks is not None)
    manifest = Manifest.load(folder)
    require_all_ranks(folder, manifest)
    check_copied(folder, manifest)
    own = own_plan(folder, manifest)
    was = own.config.cutting
    engine = manifest.compat if compat is None else None if compat == NO_ENGINE else compat
    if engine is not None and was.predicts:
        raise UnsupportedModelError(
            f"the ranks of {folder} hold a layer that predicts more tokens (mtp.*), which {engine} does not load as "
            f"part of the model; shard the checkpoint itself with --compat {engine}"
        )
    cutting = replace(cutting or was, engine=engine, predicts=was.predicts)
    config = own.config if cutting == was else ModelConfig.load(folder, cutting)
    plan = source_plan(config, own.tensors, tp_size)
    shards = open_shards(folder, manifest, range(manifest.tp_size))
    # The same tensors in the same order, some of them by the names of another engine.
    held = dict(zip(plan.shards[0], own.plan.shards[0], strict=True))
    recipe = make_recipe(
        config,
        plan,
        source=manifest.source,
        dtype=manifest.dtype,
        max_part_size=max_part_size or manifest.max_part_size,
        ranks=ranks,
        compat=engine,
        cutting=cutting,
        dtypes={name: manifest.tensors(0)[held[name]].dtype for name in plan.shards[0]},
        inputs={name: shards[held[name]] for name in plan.shards[0]},
        extra=open_extra(folder, manifest),
        small_files={folder / name: manifest.files[name] for name in sorted(manifest.files)},
        identity=sha256(manifest.text().encode()).hexdigest(),
        without=f"give --compat {NO_ENGINE}",
    )
    # What is read is checked against its digests on the way, so a change meanwhile cannot go unseen.
    return write_shards(recipe, out, force=force, add=ranks is not None, check=lambda: None, progress=progress)
