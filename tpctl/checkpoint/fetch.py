"""A model's files in a folder of the user's choice instead of the cache: what ``tpctl download -o`` does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tpctl.checkpoint import hub
from tpctl.checkpoint.cache import require_space, writing
from tpctl.checkpoint.folder import small_files_of
from tpctl.checkpoint.outputs import require_utf8, resolved
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.sources import Notify, ResolvedSource, hub_id, is_local, resolve, to_stderr
from tpctl.errors import SourceError
from tpctl.json_file import is_file


def fetch(
    model: str,
    output: Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_ranks: Sequence[int] | None = None,
    progress: Progress | None = None,
    notify: Notify = to_stderr,
) -> ResolvedSource:
    """``resolve``, with the files in ``output`` instead of the cache where it is given.

    A Hub model is downloaded straight into ``output`` and continues there when run again; anything else is copied.

    Raises:
        SourceError: as ``resolve``; or ``output`` holds something else already.
        CheckpointError: in the place of a file to copy there is something else.
    """
    if output is None:
        return resolve(
            model,
            revision=revision,
            token=token,
            local_ranks=local_ranks,
            progress=progress,
            notify=notify,
        )
    resolved(output)
    if not is_local(model):
        repo, revision = hub_id(model, revision)
        _refuse_foreign(output)
        remote = hub.ask(repo, revision, token)
        folder = hub.download(
            remote, token=token, ranks=local_ranks, progress=progress, local_dir=output, notify=notify
        )
        return ResolvedSource(folder, repo, remote.commit)
    source = resolve(model, revision=revision, token=token, progress=progress, notify=notify)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SourceError(f"{output} exists and is not empty; choose another folder or remove it")
    small_files_of(source.folder)  # of which none may be missed
    found = [path for path in source.folder.rglob("*") if not path.is_dir() and is_file(path)]
    for path in found:
        require_utf8(path)
    size = sum(path.stat().st_size for path in found)
    require_space(output.absolute(), size, f"a copy of {source.id}")
    with writing(output, chosen=True):
        temporary = output.with_name(f".{output.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _copy_folder(source.folder, temporary)
            if output.exists():
                output.rmdir()
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ResolvedSource(output, source.id, source.revision)


def _refuse_foreign(output: Path) -> None:
    """Refuse a folder that holds files which no download put there.

    Downloads are told by huggingface_hub's records (``.cache/huggingface``) and by their unfinished files.
    """
    if not output.is_dir() or (output / ".cache" / "huggingface").is_dir():
        return
    if any(output.glob(".*.partial")) or any(output.glob(".*.lock")):
        return
    if any(output.iterdir()):
        raise SourceError(f"{output} holds files that are no earlier download's; choose another folder or empty it")


def _copy_folder(source: Path, target: Path) -> None:
    """``shutil.copytree``, which wraps the operating system's errors in one of its own; raises the first of them."""

    def copy(found: str, wanted: str) -> None:
        try:
            shutil.copy2(found, wanted)
        except OSError as error:
            failures.append(error)
            raise

    failures: list[OSError] = []
    try:
        shutil.copytree(source, target, copy_function=copy)
    except shutil.Error:
        raise failures[0] from None
