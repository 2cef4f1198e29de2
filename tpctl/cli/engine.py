"""Engine options as the client takes them, and what is said of an engine: for ``chat``, ``batch`` and ``bench``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from tpctl.cli.console import byte_progress, note
from tpctl.cli.options import KV_FORMS, EngineOptions, SchedulingPolicy, Speculate
from tpctl.cli.signals import end_if_told
from tpctl.cli.units import parse_bytes
from tpctl.errors import UsageError, format_bytes
from tpctl.wire.report import EngineInfo
from tpctl.wire.settings import CPU_TOKENS, EngineConfig

if TYPE_CHECKING:
    from tpctl.checkpoint.sources import ResolvedSource
    from tpctl.client.prepare import EngineArgs
    from tpctl.launch.nodes import Nodes


SPECULATIONS = {
    "ngram": "n-gram speculation",
    "mtp": "speculation by its own layer (MTP)",
    "off": "no speculation, which it cannot have there",
}
"""What is said of an engine that speculates, or was asked to."""


def prepare(
    model: str,
    options: EngineOptions,
    policy: SchedulingPolicy = SchedulingPolicy.fcfs,
    look: Callable[[ResolvedSource], object] = lambda source: None,
    cpu_tokens: int = CPU_TOKENS,
    nodes: Nodes | None = None,
    speculate: Speculate = Speculate.off,
) -> EngineConfig:
    """Find the model and settle how it is run, with progress on stderr (``client.prepare``).

    Args:
        look: sees the model's files before its weights are read, and raises if they cannot be used.
        cpu_tokens: of a step on a CPU, where the options name none.
        nodes: hosts that its ranks are on, where they are several.
        speculate: what proposes tokens.

    Raises:
        TpctlError: the model cannot be had, or not run in this way.
    """
    from tpctl.client import prepare as client

    args = replace(engine_args(options, policy, cpu_tokens), speculate=str(speculate))
    if nodes is not None:
        args = replace(args, nodes=nodes)
    config = client.prepare(model, args, look=look, progress=byte_progress)
    say_static_scales(config)
    return config


def lend_ranks(config: EngineConfig, nodes: Nodes) -> None:
    """Run this host's ranks of an engine that is talked to on the first host, until it ends.

    Raises:
        TpctlError: a rank here failed, or another host did.
    """
    from tpctl.launch.torchrun import Workers

    workers = Workers(config, nodes=nodes)
    try:
        say_nodes(config, nodes)
        end_if_told()
        workers.wait()
    finally:
        workers.close()


def say_nodes(config: EngineConfig, nodes: Nodes) -> None:
    """Tell which ranks are here, where others are on other hosts."""
    if nodes.count > 1:
        ranks = nodes.ranks_here(config.tp_size)
        here = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        note(f"host {nodes.rank + 1} of {nodes.count}: {here} of {config.tp_size}; all meet at {nodes.endpoint}")


def engine_args(
    options: EngineOptions, policy: SchedulingPolicy = SchedulingPolicy.fcfs, cpu_tokens: int = CPU_TOKENS
) -> EngineArgs:
    """The options as the client takes them.

    Raises:
        UsageError: the size of the KV cache is none, or options contradict each other.
    """
    from tpctl.client.prepare import EngineArgs

    if options.expert_parallel and options.ep is not None:
        raise UsageError(f"--expert-parallel and --ep {options.ep} say two things; give one of them")
    memory = options.kv_cache_memory
    return EngineArgs(
        tp=options.tp,
        device=None if options.device is None else str(options.device),
        dtype=str(options.dtype),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        cpu_batched_tokens=cpu_tokens,
        block_size=options.block_size,
        kv_cache_memory=None if memory is None else parse_bytes(memory, "GiB"),
        kv_cache_dtype=str(options.kv_cache_dtype),
        gpu_memory_utilization=options.gpu_memory_utilization,
        attention_backend=str(options.attention_backend),
        enforce_eager=options.enforce_eager,
        scheduling_policy=str(policy),
        expert_parallel=True if options.expert_parallel else options.ep,
        text_only=options.text_only,
    )


def describe(info: EngineInfo, *, drafts_wanted: bool = False) -> str:
    """How an engine runs, from what it said of itself when it was ready.

    Args:
        drafts_wanted: say that it does not speculate, too.
    """
    where = "GPU" if info.device == "cuda" else "CPU"
    sums = f", all-reduce by {info.all_reduce}" if info.all_reduce else ""
    cache = f", {KV_FORMS[info.kv_cache_dtype]}" if info.kv_cache_dtype in KV_FORMS else ""
    dealt = f", ep {info.expert_parallel}" if info.expert_parallel > 1 else ""
    drafts = f", {SPECULATIONS[info.speculation]}" if drafts_wanted or info.speculation != "off" else ""
    return f"tp {info.tp_size}{dealt}, {info.dtype}, {info.attention_backend} attention on {where}{cache}{sums}{drafts}"


def say_policy(asked: SchedulingPolicy | None, info: EngineInfo) -> None:
    """Tell of a scheduling policy that was asked for and cannot be had."""
    if asked not in (None, SchedulingPolicy.auto) and info.scheduling_policy != asked:
        note(
            f"--scheduling-policy {asked} needs a GPU with --attention-backend triton and without --enforce-eager; "
            f"{info.scheduling_policy} it is"
        )


def say_static_scales(config: EngineConfig) -> None:
    """Tell of scales of activations that the checkpoint has and that are not used."""
    from tpctl.arch.config import ModelConfig
    from tpctl.arch.quantised import has_static_inputs

    if has_static_inputs(ModelConfig.load(config.text_dir).blueprint):
        note(
            "the model's static scales of activations are not used: a scale is found for each token, "
            "which rounds no coarser and cuts nothing off"
        )


def say_context(info: EngineInfo) -> None:
    """Tell of a context that is shorter than the model's, because the KV cache is too small for it."""
    held, wanted = info.max_model_len, info.wanted_model_len
    if held < wanted:
        more = "--kv-cache-memory" + (" or --gpu-memory-utilization" if info.device == "cuda" else "")
        note(
            f"the KV cache of {format_bytes(info.kv_cache_bytes)} a rank holds {held:,} tokens, fewer than the "
            f"model's {wanted:,}: prompt and answer together are limited to {held:,}; raise {more} if that is too few"
        )


class Interrupts:
    """Counts signals while something runs that should end tidily.

    Attributes:
        number: the last one's.
    """

    def __init__(self) -> None:
        self.count = 0
        self.number = int(signal.SIGINT)

    def __bool__(self) -> bool:
        return self.count > 0


@contextmanager
def interrupts(*signals: signal.Signals) -> Iterator[Interrupts]:
    """Let the first Ctrl-C, or the first of ``signals``, only be noted; the second raises ``KeyboardInterrupt``.

    A note is safer than an exception, which could strike in the middle of a message to the workers.
    """
    noted = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        noted.count += 1
        noted.number = number
        if noted.count > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in signals or (signal.SIGINT,)}
    try:
        end_if_told()
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
