"""Uploads of shard and checkpoint folders to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpctl.checkpoint.hub_errors import explained
from tpctl.checkpoint.hub_settings import check_settings
from tpctl.checkpoint.sources import HUB_ID, check_folder
from tpctl.errors import SourceError
from tpctl.manifest.manifest import MANIFEST, Manifest


@dataclass(frozen=True)
class UploadReport:
    """What was uploaded; ``url`` is the commit's page, ``bytes`` the size of all files together."""

    repo: str
    commit: str
    url: str
    files: int
    bytes: int


def upload_folder(
    folder: Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str = "Upload with tpctl",
    token: str | None = None,
) -> UploadReport:
    """Commit the files of ``folder`` to ``repo``, which is made if it does not exist. Hidden files stay behind.

    Raises:
        SourceError: ``folder`` is no model, the name is none, or the Hub refuses or cannot be reached.
        ShardFolderError: it is a shard folder with a part missing or altered.
    """
    if not HUB_ID.fullmatch(repo):
        raise SourceError(f"{repo!r} is no repository name; write org/name")
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}")
    check_folder(folder)
    if (folder / MANIFEST).is_file():
        Manifest.load(folder).check_files(folder)
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]

    check_settings(token, revision=revision, message=message)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with explained(repo, revision, "and run the command again"):
        api = HfApi(token=token)
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[path.name for path in files],
        )
    size = sum(path.stat().st_size for path in files)
    return UploadReport(repo, done.oid, str(done.commit_url), len(files), size)
