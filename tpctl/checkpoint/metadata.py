"""What a model is, without its weights: its config and, where they can be read, its tensors' names and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tpctl.checkpoint import hub
from tpctl.checkpoint.folder import INDEX, SINGLE, CheckpointFolder, read_index
from tpctl.checkpoint.hub_cache import cached
from tpctl.checkpoint.hub_errors import HubUnreachable, explained
from tpctl.checkpoint.retry import FILE_SECONDS, patiently
from tpctl.checkpoint.safetensors import TensorSpec, source_headers
from tpctl.checkpoint.sources import Notify, hub_id, is_local, local_path, resolve, to_stderr
from tpctl.errors import SourceError
from tpctl.manifest.manifest import MANIFEST, Manifest


@dataclass(frozen=True)
class ModelMetadata:
    """A model as its config and headers describe it.

    Attributes:
        folder: where ``config.json`` is; the weights need not be there.
        tensors: of the source checkpoint, by name; ``None`` where there is only a config.
        cast: the safetensors dtype that its floats were cast to, if these are shards of it.
        expert_parallel, even: how they were cut then, as in the manifest.
    """

    folder: Path
    id: str
    revision: str | None
    tensors: Mapping[str, TensorSpec] | None
    cast: str | None = None
    expert_parallel: int = 1
    even: bool = False


def read_metadata(
    model: str, *, revision: str | None = None, token: str | None = None, notify: Notify = to_stderr
) -> ModelMetadata:
    """Read what ``model`` (any MODEL form, or a folder that holds only a ``config.json``) is.

    Of a model on the Hub, only the config and the headers of its weight files are fetched.

    Raises:
        SourceError: it cannot be found or reached.
        CheckpointError: its headers are damaged.
    """
    folder = local_path(model)
    if folder.is_dir() and (folder / "config.json").is_file():
        return _local(folder, model, None)
    if is_local(model):
        source = resolve(model, revision=revision, token=token, notify=notify)
        return _local(source.folder, source.id, source.revision)
    repo, revision = hub_id(model, revision)
    try:
        remote = hub.ask(repo, revision, token)
    except HubUnreachable:
        copy = cached(repo, revision)
        if copy is None:
            raise
        return _local(copy[0], repo, copy[1])
    return _remote_metadata(remote, token)


def _local(folder: Path, id: str, revision: str | None) -> ModelMetadata:
    cut: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        cut = {"cast": manifest.dtype, "expert_parallel": manifest.expert_parallel, "even": manifest.even}
        headers = list(source_headers(manifest.source.files, folder / MANIFEST).values())
    elif any(folder.glob("*.safetensors")):
        headers = [file.header for file in CheckpointFolder.open(folder).files]
    else:
        if (folder / INDEX).is_file():
            read_index(folder / INDEX)  # the weights may be elsewhere, but one that is broken is not to be passed over
        return ModelMetadata(folder, id, revision, None)
    tensors = {name: TensorSpec(name, t.dtype, t.shape) for header in headers for name, t in header.tensors.items()}
    return ModelMetadata(folder, id, revision, tensors, **cut)


def _remote_metadata(remote: hub.RemoteModel, token: str | None) -> ModelMetadata:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # which would be drawn where stderr is no terminal too
    hub.check_model(remote)
    names = remote.names()
    fetch = partial(hf_hub_download, remote.id, revision=remote.commit, token=token, etag_timeout=10)
    headers = partial(HfApi(token=token).get_safetensors_metadata, remote.id, revision=remote.commit)
    with explained(remote.id, remote.commit):
        paths = [
            Path(patiently(partial(fetch, filename=name), FILE_SECONDS))
            for name in ("config.json", "generation_config.json", "hf_quant_config.json")
            if name in names
        ]
        if INDEX in names and SINGLE not in names:  # the library believes what stands in it
            index = Path(patiently(partial(fetch, filename=INDEX), FILE_SECONDS))
            read_index(index, f"{remote.id}/{INDEX}")
        try:
            found = patiently(headers, FILE_SECONDS)
        except NotASafetensorsRepoError:
            return ModelMetadata(paths[0].parent, remote.id, remote.commit, None)
        except SafetensorsParsingError as error:
            raise SourceError(f"{remote.id} has a damaged weight file: {error}") from None
    tensors = {
        name: TensorSpec(name, info.dtype, tuple(info.shape))
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return ModelMetadata(paths[0].parent, remote.id, remote.commit, tensors)
