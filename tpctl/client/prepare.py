"""From MODEL, however it is named, to the settings of an engine that can be started.

    MODEL ── supported_source ──► its files ── configure ──► shards, hashed once ──► EngineConfig

What cannot work is refused as early as it can be known: before anything is fetched, and before anything is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import build_plan, check_text_only
from tpctl.attention_choice import Heads, Machine, choose
from tpctl.checkpoint.hub_cache import cached
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.sources import ResolvedSource, hub_id, is_local, local_path, resolve
from tpctl.errors import MixedDtypesError, UnsupportedModelError, UsageError, shown
from tpctl.launch.device import choose_device
from tpctl.launch.loopback import require_loopback
from tpctl.launch.nodes import ONE_HOST, Nodes
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.sharding.cache import ensure_sharded
from tpctl.sharding.proving.verified import ensure_verified
from tpctl.wire.settings import (
    CPU_SEQS,
    CPU_TOKENS,
    DEVICES,
    GPU_SEQS,
    GPU_TOKENS,
    EngineChoices,
    EngineConfig,
    EngineSettings,
)

Progresses = Callable[[str], AbstractContextManager[Progress]]
"""Opens what shows how far a piece of work has come, in bytes, under a title."""


@contextmanager
def unseen(title: str) -> Iterator[Progress]:
    """Progress that nobody watches."""
    yield lambda done, total, what="": None


@dataclass(frozen=True, kw_only=True)
class EngineArgs(EngineChoices):
    """How somebody wants a model to be run.

    Attributes:
        tp: ranks; ``None`` takes those of the shard folder, if MODEL is one, else 1.
        device: ``None`` takes GPUs if there are any.
        max_num_seqs, max_num_batched_tokens: ``None`` takes what suits the device.
        cpu_batched_tokens: what the latter is on a CPU.
        expert_parallel: groups of ranks that whole experts are dealt to; ``True``: as many as ranks; ``None``: as the
            shard folder, if MODEL is one, else one, so that every rank has a part of each expert.
        text_only: run the text of a model that also sees, of which no more is cut.
        nodes: hosts that the ranks of one engine are on.

    Raises:
        UsageError: a value is out of range.
    """

    tp: int | None = None
    device: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    cpu_batched_tokens: int = CPU_TOKENS
    expert_parallel: int | bool | None = None
    text_only: bool = False
    nodes: Nodes = ONE_HOST

    def __post_init__(self) -> None:
        if self.device not in (None, *DEVICES):
            raise UsageError(f"unknown device {self.device!r}; use {', '.join(DEVICES)}")
        for name in ("tp", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} is {shown(value)}, but must be a whole number, at least 1")
        groups = self.expert_parallel
        if groups is not None and not isinstance(groups, bool) and (not isinstance(groups, int) or groups < 1):
            raise UsageError(f"expert_parallel is {shown(groups)}, but must be a whole number, at least 1, or True")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0.01 <= share <= 1:
            raise UsageError(f"gpu_memory_utilization is {shown(share)}, but must be a number from 0.01 to 1")

    def groups(self, tp_size: int) -> int | None:
        """The groups of ranks that experts are dealt to, of ``tp_size``."""
        if isinstance(self.expert_parallel, bool):
            return tp_size if self.expert_parallel else 1
        return self.expert_parallel

    def settle(self, tp_size: int | None = None) -> EngineSettings:
        """What they come to on this machine.

        Args:
            tp_size: the ranks, once it is known how many; ``None`` takes what is asked for, or 1.

        Raises:
            UsageError: a setting is unknown, or does not suit this machine or another one; or the hosts would not have
                equally many ranks.
            EngineError: several ranks are asked for, and cannot reach each other.
        """
        tp_size = tp_size or self.tp or 1
        if tp_size > 1 and self.nodes.count == 1:
            require_loopback()
        device = choose_device(self.device, len(self.nodes.ranks_here(tp_size)))
        seqs, tokens = (CPU_SEQS, self.cpu_batched_tokens) if device == "cpu" else (GPU_SEQS, GPU_TOKENS)
        num_seqs = self.max_num_seqs or seqs
        return EngineSettings(
            **self.choices,
            device=device,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or max(tokens, num_seqs),
        )


def prepare(
    model: str,
    args: EngineArgs,
    *,
    look: Callable[[ResolvedSource], object] = lambda source: None,
    progress: Progresses = unseen,
) -> EngineConfig:
    """Find the model and ``configure`` an engine for it.

    Args:
        look: sees the model's files before its weights are read, and raises if they cannot be used.

    Raises:
        TpctlError: the model cannot be had, or not run in this way.
    """
    settings = args.settle()
    source = supported_source(
        model,
        args.tp,
        check=lambda config: _check_run(config, settings),
        cutting=Cutting(args.groups(args.tp or 1) or 1),
        text_only=args.text_only,
        progress=progress,
    )
    _check_run(ModelConfig.load(source.folder), settings)  # of shards too, of which a missing template says less
    look(source)
    return configure(source, args, progress=progress)


def configure(source: ResolvedSource, args: EngineArgs, *, progress: Progresses = unseen) -> EngineConfig:
    """Shard a model into the cache if need be, hash shards that never were, and settle how they are run.

    Raises:
        TpctlError: the model cannot be sharded, its shards are damaged, or it cannot be run in this way.
    """
    tp_size = args.tp
    if tp_size is None:
        tp_size = Manifest.load(source.folder).tp_size if (source.folder / MANIFEST).is_file() else 1
    settings = args.settle(tp_size)
    _check_run(ModelConfig.load(source.folder), settings)
    how: dict[str, Any] = {"expert_parallel": args.groups(tp_size), "text_only": args.text_only}
    with progress("sharding") as told:
        try:
            folder = ensure_sharded(source, tp_size, progress=told, **how)
        except MixedDtypesError:  # they cannot be stored as they are, so they are cast here and not by the engine
            if args.dtype == "auto":
                raise
            folder = ensure_sharded(source, tp_size, args.dtype, told, **how)
    with progress("verifying") as told:
        ensure_verified(folder, args.nodes.ranks_here(tp_size), told)
    return EngineConfig(folder, tp_size, source.folder, **asdict(settings))


def model_digest(config: EngineConfig) -> str:
    """What tells a model's weights and texts from those of another revision."""
    manifest = Manifest.load(config.shard_dir)
    return blake2b(repr((manifest.source.files, manifest.dtype)).encode(), digest_size=16).hexdigest()


def _check_run(config: ModelConfig, settings: EngineSettings) -> None:
    """Refuse a model that tpctl cuts and does not run, or not on that device, for sequences of that length, with drafts
    of such a kind, or by that attention backend or with that KV cache."""
    config.blueprint.check_runs(settings.device)
    choose(
        settings.attention_backend,
        settings.kv_cache_dtype,
        settings.device,
        None if settings.dtype == "auto" else settings.dtype,
        [Heads.of(attention) for attention in config.blueprint.attentions],
        block_size=settings.block_size,
        machine=Machine(triton=find_spec("triton") is not None),
    )
    if settings.speculate == "mtp" and config.blueprint.further is None:
        raise UnsupportedModelError(
            f"--speculate mtp takes a layer that predicts more tokens (MTP), and a {config.model_type} model has none; "
            "use --speculate ngram, or auto"
        )
    settings.longest(config.max_position_embeddings, config.beyond)


def supported_source(
    model: str,
    tp_size: int | None,
    *,
    check: Callable[[ModelConfig], object] = lambda config: None,
    cutting: Cutting = Cutting(),
    text_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progresses = unseen,
) -> ResolvedSource:
    """Find ``model`` and fetch what is missing, once its config says that it can be cut into ``tp_size`` shards.

    A model that cannot be run is thus refused before its weights are downloaded.

    Args:
        check: looks at the config, and raises if the model cannot be used as it should be.
        cutting, text_only: as of ``shard_checkpoint``.

    Raises:
        SourceError: it cannot be found or reached.
        UnsupportedModelError, PartitionError, CheckpointError: it cannot be run, or not at this size; or it also sees,
            and ``text_only`` is not given.
    """
    known = _known(model, revision, token)
    if known is not None:
        folder, names = known
        config = ModelConfig.load(folder, cutting)
        build_plan(config, tp_size or 1)
        check(config)
        check_text_only(config, names, text_only)
    with progress(f"downloading {model}") as told:
        return resolve(model, revision=revision, token=token, progress=told)


def _known(model: str, revision: str | None, token: str | None) -> tuple[Path, Collection[str]] | None:
    """Where the model's config is, if it can be had before the weights and has not been seen with them before; and, of
    a model on the Hub, the names of its tensors."""
    folder = local_path(model)
    if (folder / MANIFEST).is_file():
        return None
    if (folder / "config.json").is_file():
        return folder, ()
    if is_local(model) or cached(*hub_id(model, revision)) is not None:
        return None
    metadata = read_metadata(model, revision=revision, token=token)
    return metadata.folder, metadata.tensors or ()
