"""From a MODEL argument to a checkpoint that tpctl can cut and run: what ``shard``, ``chat`` and ``batch`` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tpctl.cli.console import byte_progress

if TYPE_CHECKING:
    from tpctl.arch.config import ModelConfig
    from tpctl.checkpoint.sources import ResolvedSource


def supported_source(
    model: str,
    tp_size: int | None,
    *,
    check: Callable[[ModelConfig], object] = lambda config: None,
    revision: str | None = None,
    token: str | None = None,
) -> ResolvedSource:
    """Find ``model`` and fetch what is missing, once its config says that it can be cut into ``tp_size`` shards.

    A model that cannot be run is thus refused before its weights are downloaded.

    Args:
        check: looks at the config, and raises if the model cannot be used as it should be.

    Raises:
        SourceError: it cannot be found or reached.
        UnsupportedModelError, PartitionError, CheckpointError: it cannot be run, or not at this size.
    """
    from tpctl.checkpoint.sources import resolve

    config = _config_folder(model, revision, token)
    if config is not None:
        from tpctl.arch.config import ModelConfig
        from tpctl.arch.source_plan import build_plan

        found = ModelConfig.load(config)
        build_plan(found, tp_size or 1)
        check(found)
    with byte_progress(f"downloading {model}") as progress:
        return resolve(model, revision=revision, token=token, progress=progress)


def _config_folder(model: str, revision: str | None, token: str | None) -> Path | None:
    """Where the model's config is, if it can be had before the weights and has not been seen with them before."""
    from tpctl.checkpoint.hub_cache import cached
    from tpctl.checkpoint.metadata import read_metadata
    from tpctl.checkpoint.sources import hub_id, is_local, local_path
    from tpctl.manifest.manifest import MANIFEST

    folder = local_path(model)
    if (folder / MANIFEST).is_file():
        return None
    if (folder / "config.json").is_file():
        return folder
    if is_local(model) or cached(*hub_id(model, revision)) is not None:
        return None
    return read_metadata(model, revision=revision, token=token).folder
