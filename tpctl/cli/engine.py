"""From a MODEL argument and engine options to a running engine: what ``chat`` and ``batch`` share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tpctl.cli.console import byte_progress, note
from tpctl.cli.options import CPU_SEQS, CPU_TOKENS, GPU_SEQS, GPU_TOKENS, DType, EngineOptions, SchedulingPolicy
from tpctl.cli.source import supported_source
from tpctl.cli.units import parse_bytes
from tpctl.errors import MixedDtypesError, format_bytes
from tpctl.wire.settings import EngineConfig

if TYPE_CHECKING:
    from tpctl.checkpoint.sources import ResolvedSource


def prepare(
    model: str,
    options: EngineOptions,
    policy: SchedulingPolicy = SchedulingPolicy.fcfs,
    look: Callable[[ResolvedSource], object] = lambda source: None,
) -> EngineConfig:
    """Find the model and ``configure`` an engine for it. What cannot work is refused before anything is fetched.

    Args:
        look: sees the model's files before its weights are read, and raises if they cannot be used.

    Raises:
        TpctlError: the model cannot be had, or not run in this way.
    """
    settings = settle(options, policy)
    source = supported_source(model, options.tp, check=lambda config: settings.longest(config.max_position_embeddings))
    look(source)
    return configure(source, options, policy)


def configure(
    source: ResolvedSource, options: EngineOptions, policy: SchedulingPolicy = SchedulingPolicy.fcfs
) -> EngineConfig:
    """Settle the engine's configuration, shard the model into the cache if need be, and hash shards that never were.

    Raises:
        TpctlError: the model cannot be sharded, its shards are damaged, or it cannot be run in this way.
    """
    from tpctl.arch.config import ModelConfig
    from tpctl.manifest.manifest import MANIFEST, Manifest
    from tpctl.sharding.cache import ensure_sharded
    from tpctl.sharding.proving.verified import ensure_verified

    tp_size = options.tp
    if tp_size is None:
        sharded = (source.folder / MANIFEST).is_file()
        tp_size = Manifest.load(source.folder).tp_size if sharded else 1
    settings = settle(options, policy, tp_size)
    settings.longest(ModelConfig.load(source.folder).max_position_embeddings)
    with byte_progress("sharding") as progress:
        try:
            folder = ensure_sharded(source, tp_size, progress=progress)
        except MixedDtypesError:  # they cannot be stored as they are, so they are cast here and not by the engine
            if options.dtype is DType.auto:
                raise
            folder = ensure_sharded(source, tp_size, str(options.dtype), progress)
    with byte_progress("verifying") as progress:
        ensure_verified(folder, range(tp_size), progress)
    return replace(settings, shard_dir=folder, model_dir=source.folder)


def settle(options: EngineOptions, policy: SchedulingPolicy, tp_size: int | None = None) -> EngineConfig:
    """The engine's configuration, but for the shards.

    Args:
        tp_size: the one to use; ``None`` takes that of ``options``, or 1.

    Raises:
        UsageError: an option is wrong, or does not suit this machine or another option.
        EngineError: several ranks are asked for, and cannot reach each other.
    """
    from tpctl.launch.device import choose_device
    from tpctl.launch.loopback import require_loopback

    tp_size = tp_size or options.tp or 1
    if tp_size > 1:
        require_loopback()
    device = choose_device(options.device, tp_size)
    seqs, tokens = (CPU_SEQS, CPU_TOKENS) if device == "cpu" else (GPU_SEQS, GPU_TOKENS)
    memory = None if options.kv_cache_memory is None else parse_bytes(options.kv_cache_memory, "GiB")
    return EngineConfig(
        shard_dir=Path(),
        tp_size=tp_size,
        device=device,
        dtype=str(options.dtype),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs or seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or max(tokens, options.max_num_seqs or 0),
        block_size=options.block_size,
        kv_cache_memory=memory,
        kv_cache_dtype=str(options.kv_cache_dtype),
        gpu_memory_utilization=options.gpu_memory_utilization,
        attention_backend=str(options.attention_backend),
        enforce_eager=options.enforce_eager,
        scheduling_policy=str(policy),
    )


def describe(info: dict[str, Any]) -> str:
    """How an engine runs, from what it said of itself when it was ready."""
    where = "GPU" if info["device"] == "cuda" else "CPU"
    sums = f", all-reduce by {info['all_reduce']}" if info.get("all_reduce") else ""
    cache = ", packed KV cache" if info.get("kv_cache_dtype") == "packed" else ""
    return f"tp {info['tp_size']}, {info['dtype']}, {info['attention_backend']} attention on {where}{cache}{sums}"


def say_policy(asked: SchedulingPolicy | None, info: dict[str, Any]) -> None:
    """Tell of a scheduling policy that was asked for and cannot be had."""
    if asked is not None and info["scheduling_policy"] != asked:
        note(
            f"--scheduling-policy {asked} needs a GPU with --attention-backend triton and without --enforce-eager; "
            f"{info['scheduling_policy']} it is"
        )


def say_context(info: dict[str, Any]) -> None:
    """Tell of a context that is shorter than the model's, because the KV cache is too small for it."""
    held = info.get("max_model_len", 0)
    wanted = info.get("wanted_model_len", held)
    if held < wanted:
        more = "--kv-cache-memory" + (" or --gpu-memory-utilization" if info["device"] == "cuda" else "")
        note(
            f"the KV cache of {format_bytes(info['kv_cache_bytes'])} a rank holds {held:,} tokens, fewer than the "
            f"model's {wanted:,}: prompt and answer together are limited to {held:,}; raise {more} if that is too few"
        )


class Interrupts:
    """Counts Ctrl-C while something runs that should end tidily."""

    def __init__(self) -> None:
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Let the first Ctrl-C only be noted; the second raises ``KeyboardInterrupt``.

    A note is safer than an exception, which could strike in the middle of a message to the workers.
    """
    noted = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        noted.count += 1
        if noted.count > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
