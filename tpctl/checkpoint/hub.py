"""Downloads from the Hugging Face Hub, and what its refusals mean.

Files go to the Hugging Face cache (``HF_HOME``), shared with every other tool that uses it. The first question to the
Hub has a hard deadline, name lookup included: where no answer comes, a copy in the cache is used, or one line says
so. ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and huggingface_hub's other settings hold.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tpctl.checkpoint.cache import readable_bytes, require_space
from tpctl.checkpoint.folder import ADAPTER, INDEX, MERGE_FIRST, SINGLE
from tpctl.checkpoint.gguf import fetch_arguments, listed, model_files
from tpctl.checkpoint.hub_cache import index_files, remember, repository
from tpctl.checkpoint.hub_errors import HubUnreachable, explained
from tpctl.checkpoint.hub_settings import check_settings, check_token
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.retry import FILE_SECONDS, patiently
from tpctl.checkpoint.transfer import Download, Meter
from tpctl.errors import SourceError, counted
from tpctl.manifest.manifest import MANIFEST

T = TypeVar("T")

ANSWER_SECONDS = 6.0
"""How long the Hub may take to answer the first question, unless HF_HUB_ETAG_TIMEOUT says otherwise."""

WORKERS = 4
"""Files that are fetched at the same time."""

_METADATA = """
    config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json
    merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json hf_quant_config.json
"""
METADATA = frozenset(_METADATA.split())
"""The files beside the weights that tpctl or a serving engine reads."""


@dataclass(frozen=True)
class RemoteFile:
    """A file by its path in the repository, its bytes, and its digest where the Hub keeps a blob of it."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class RemoteModel:
    """A repository at one commit: what the Hub says it holds."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]

    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)


def ask(repo: str, revision: str | None, token: str | None, seconds: float | None = None) -> RemoteModel:
    """Ask the Hub what ``repo`` holds at ``revision``; answers or raises within ``seconds``.

    Within that time it is asked again where it fails for a moment only (see ``patiently``).

    Raises:
        HubUnreachable: there is no answer in time, or offline mode is on.
        SourceError: the Hub refuses (unknown, private, gated, too many requests, its own failure), or a variable or
            token cannot be used.
    """
    check_settings(token, revision=revision)
    from huggingface_hub import HfApi, get_token

    if token is None and (stored := get_token()) is not None:
        check_token("the token that `hf auth login` stored", stored)
    limit = seconds or float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_SECONDS)

    def question() -> Any:
        return HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=limit)

    with explained(repo, revision):
        info = _within(limit, partial(patiently, question, limit))
    files = (
        RemoteFile(file.rfilename, int(file.size or 0), file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
    )
    return RemoteModel(repo, str(info.sha), tuple(files))


def download(
    remote: RemoteModel,
    *,
    revision: str | None = None,
    token: str | None = None,
    ranks: Sequence[int] | None = None,
    progress: Progress | None = None,
    local_dir: Path | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Path:
    """Download what tpctl needs of ``remote`` (safetensors, config, tokenizer, chat template); its folder.

    Files already complete in the cache are not fetched again.

    Args:
        revision: the branch or tag that led to this commit; remembered, so that the copy is found offline.
        ranks: of a repository that holds shards, the ranks to fetch; all of them by default.
        local_dir: put the files there instead of in the cache.
        notify: told, in one line, what is dropped of an unfinished download of another revision.

    Raises:
        SourceError: the repository has no safetensors weights, the disk is too small, or the transfer fails.
    """
    with explained(remote.id, remote.commit):
        index = None
        if INDEX in remote.names() and not {MANIFEST, SINGLE} & remote.names():
            file = next(file for file in remote.files if file.name == INDEX)
            if local_dir is None and _have(remote, file):
                index = _place(remote, file)
            else:
                index = _fetch(remote, file, token, Meter(0, None), local_dir)
        wanted = needed_files(remote, index, ranks)
        missing = [file for file in wanted if local_dir is not None or not _have(remote, file)]
        blobs = [blob for file in missing if (blob := _blob(remote, file, token, local_dir))]
        for path in (path for blob in blobs for path in blob.foreign()):
            size = readable_bytes(path.stat().st_size)
            notify(f"dropping {size} ({path}) that an unfinished download of another revision left")
        total = sum(file.size for file in missing)
        received = sum(blob.received() for blob in blobs)
        require_space(local_dir or repository(remote.id), total - received, f"downloading {remote.id}")
        meter = Meter(total, progress)
        _in_threads([partial(_fetch, remote, file, token, meter, local_dir) for file in missing], meter.stop)
    if local_dir is not None:
        return local_dir
    snapshot = repository(remote.id) / "snapshots" / remote.commit
    remember(remote.id, revision or "main", remote.commit)
    return snapshot


def _in_threads(jobs: Sequence[Callable[[], object]], stop: Callable[[], object]) -> None:
    """Run ``jobs``, a few at a time, and raise the first failure; ``stop`` asks those that run to end.

    The threads are daemons, unlike an executor's: Ctrl-C ends the program even while one waits for the network. One
    that is caught at its work when the interpreter ends may complain on stderr, so the others get a second to end.
    """
    waiting, failures = deque(jobs), list[BaseException]()

    def work() -> None:
        while waiting and not failures:
            try:
                waiting.popleft()()
            except IndexError:
                return  # another thread took the last one
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive() and not failures:
                thread.join(0.1)
    finally:
        stop()
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]


def needed_files(remote: RemoteModel, index: Path | None, ranks: Sequence[int] | None = None) -> tuple[RemoteFile, ...]:
    """The files of ``remote`` that tpctl reads: its metadata and one set of safetensors weights.

    Raises:
        SourceError: it has no config.json, no safetensors weights, or no shards of ``ranks``.
    """
    names = remote.names()
    if ranks is not None and MANIFEST not in names:
        raise SourceError(f"{remote.id} is not sharded (it has no {MANIFEST}); leave --local-ranks out")
    check_model(remote)
    tensors = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if MANIFEST in names:
        # Whatever else lies beside them was copied from the source and is covered by the manifest's digests.
        copied = {name for name in names if "/" not in name and not name.startswith(".")} - set(tensors)
        weights = copied | set(_shard_files(remote.id, tensors, ranks))
    elif index is not None:
        weights = {INDEX, *index_files(index)}
        if absent := sorted(weights - names):
            raise SourceError(f"{remote.id} is incomplete: its index lists {absent[0]}, which is not there")
    elif SINGLE in names:
        weights = {SINGLE}
    elif len(tensors) == 1:
        weights = {tensors[0]}
    elif _pickles(names):
        raise SourceError(
            f"{remote.id} has no safetensors weights, only PyTorch pickles (.bin), which can run code when "
            "opened; look for a safetensors revision (`MODEL@refs/pr/N`) or convert it on a machine you trust"
        )
    else:
        files = counted(len(tensors), "safetensors file")
        raise SourceError(f"{remote.id} holds {files} and no {INDEX}; nothing says which")
    return tuple(file for file in remote.files if file.name in METADATA or file.name in weights)


def check_model(remote: RemoteModel) -> None:
    """Raise ``SourceError`` unless ``remote`` looks like a transformers checkpoint.

    GGUF files are named, and an adapter (LoRA) that transformers would apply is refused.
    """
    names = remote.names()
    if ADAPTER in names and any(name.startswith("adapter_model") for name in names):
        raise SourceError(f"{remote.id} holds an adapter ({ADAPTER}); {MERGE_FIRST}")
    safe = any(name.endswith(".safetensors") for name in names)
    if (gguf := model_files(names)) and not safe and not (_pickles(names) and "config.json" in names):
        raise SourceError(
            f"{remote.id} holds GGUF files only ({listed(gguf)}); fetch one, as with `hf download {remote.id} "
            f"{fetch_arguments(gguf[0])} --local-dir .`, and pass it: `tpctl chat ./{gguf[0]}`"
        )
    if "config.json" not in names:
        raise SourceError(f"{remote.id} has no config.json; it is not a transformers checkpoint")


def _pickles(names: Iterable[str]) -> bool:
    return any(name.endswith((".bin", ".pth", ".pt")) for name in names)


def _shard_files(repo: str, tensors: Sequence[str], ranks: Sequence[int] | None) -> Sequence[str]:
    if ranks is None:
        return tensors
    chosen = []
    for rank in ranks:
        of_rank = [name for name in tensors if name.startswith(f"model-rank-{rank}-part-")]
        if not of_rank:
            raise SourceError(f"{repo} holds no shard of rank {rank}; leave it out of --local-ranks")
        chosen += of_rank
    return chosen


def _blob(remote: RemoteModel, file: RemoteFile, token: str | None, local_dir: Path | None) -> Download | None:
    """The resumable download of ``file``, or ``None`` if it is one for huggingface_hub alone."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if file.sha256 is None or file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return None
    target = local_dir / file.name if local_dir else repository(remote.id) / "blobs" / file.sha256
    url = hf_hub_url(remote.id, file.name, revision=remote.commit)
    return Download(url, build_hf_headers(token=token), target, file.size, file.sha256)


def _have(remote: RemoteModel, file: RemoteFile) -> bool:
    return _place(remote, file).is_file()


def _place(remote: RemoteModel, file: RemoteFile) -> Path:
    """Where the cache has ``file``, if it does."""
    return repository(remote.id) / "snapshots" / remote.commit / file.name


def _fetch(remote: RemoteModel, file: RemoteFile, token: str | None, meter: Meter, local_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    blob = _blob(remote, file, token, local_dir)
    if blob is not None:
        blob.fetch(meter)
        meter = Meter(0, None)  # huggingface_hub finds the file there and has nothing left to do but its records
    fetch = partial(
        hf_hub_download,
        remote.id,
        file.name,
        revision=remote.commit,
        token=token,
        local_dir=local_dir,
        tqdm_class=_bar(meter, file.name),
        etag_timeout=10,
    )
    return Path(patiently(fetch, FILE_SECONDS))


def _bar(meter: Meter, name: str) -> Any:
    """A tqdm class for huggingface_hub that draws nothing and tells ``meter``."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            meter.add(int(n or 0), name)

    return Bar


def _within(seconds: float, question: Callable[[], T]) -> T:
    """The answer to ``question``, or HubUnreachable. A name lookup cannot be stopped: its thread stays."""
    box: list[T] = []
    failure: list[BaseException] = []

    def ask_it() -> None:
        try:
            box.append(question())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=ask_it, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not box:
        raise HubUnreachable(f"no answer within {seconds:g} s")
    return box[0]
