"""``tpctl plan``: what a model needs, before anything is downloaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import print_json, stdout
from tpctl.cli.options import DType, KvCacheDType
from tpctl.cli.units import parse_bytes
from tpctl.errors import UsageError, format_bytes
from tpctl.manifest.manifest import describe_ranks
from tpctl.wire.settings import GPU_SEQS, GPU_TOKENS

if TYPE_CHECKING:
    from tpctl.planning.fit import FitReport, RankFit

LEAST_GPU = 1 << 30
"""Bytes: less is a unit mistaken or forgotten."""


def plan(
    model: Annotated[str, typer.Argument(help="As of `tpctl shard`; a folder with a config.json is enough.")],
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Show this size rank by rank.")] = None,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of one GPU, with its unit.")] = "80GiB",
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of a GPU's memory to use.")
    ] = 0.9,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one sequence. Default: the model's limit.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences computed together.")] = GPU_SEQS,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in one step.")] = GPU_TOKENS,
    kv_cache_dtype: Annotated[
        KvCacheDType,
        typer.Option(help="packed: bfloat16 in 12 bits a value; model: as it is, for other backends than triton."),
    ] = KvCacheDType.auto,
    dtype: Annotated[DType, typer.Option(help="Cast floats to it; auto: as stored.")] = DType.auto,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token; default: the one `hf auth login` stored.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Say which tensor-parallel sizes work, what each costs, and what fits; reads headers, never weights."""
    from tpctl.checkpoint.metadata import read_metadata
    from tpctl.planning.fit import Budget, plan_model

    memory = parse_bytes(gpu_memory, "GiB")
    if memory < LEAST_GPU:
        raise UsageError(
            f"--gpu-memory {gpu_memory} is {format_bytes(memory)}, less than any GPU has; write it like 80GiB"
        )
    budget = Budget(
        memory,
        gpu_memory_utilization,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        kv_cache_dtype=str(kv_cache_dtype),
    )
    metadata = read_metadata(model, revision=revision, token=token)
    report = plan_model(metadata, budget, tp_size=tp, dtype=dtype.value)
    if json:
        print_json(asdict(report))
    else:
        _print(report)


def _print(report: FitReport) -> None:
    from rich.table import Table

    revision = f"@{report.revision[:12]}" if report.revision else ""
    origin = "from the weight files' headers" if report.exact else "from config.json alone"
    console = stdout()
    console.print(
        f"{report.model}{revision} ({report.model_type}): {report.parameters / 1e6:,.1f} M parameters, "
        f"{_gib(report.source_bytes)} as stored, {origin}",
        soft_wrap=True,
    )
    console.print(
        f"on GPUs of {_gib(report.gpu_memory)}, {report.utilization:.0%} used: sequences of up to "
        f"{report.max_model_len} tokens, {report.max_num_batched_tokens} tokens a step, {report.dtype}"
        f"{', packed KV cache' if report.kv_cache_dtype == 'packed' else ''}\n",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tp", justify="right", no_wrap=True)
    table.add_column("split", no_wrap=True)
    for title in ("slower", "copies", "weights", "KV/token", "context", "seqs", "GPU needed"):
        table.add_column(title, justify="right", no_wrap=True)
    for size in report.sizes:
        fits = size.concurrency > 0
        table.add_row(
            str(size.tp_size),
            size.verdict,
            f"{size.imbalance - 1:.1%}" if size.verdict == "uneven" else "",
            f"{size.kv_copies:.3g}" if size.kv_copies > 1 else "",
            _gib(size.weight_bytes),
            f"{size.kv_bytes_per_token / 1024:.1f} KiB",
            f"{size.max_context}" if size.kv_tokens else "-",
            f"{size.concurrency}" if fits else "-",
            _gib(size.needed),
            style="" if fits else "dim",
        )
    console.print(table)
    console.print(f"tp {report.limit} and more cannot work: {report.limit_reason}", soft_wrap=True)
    console.print(
        "slower: a step, than if the split were even; all wait for the largest rank. copies: of each KV head\n",
        soft_wrap=True,
    )
    _print_ranks(report)


def _print_ranks(report: FitReport) -> None:
    """The detailed size; ranks that hold the same share a line."""
    from rich.table import Table

    console = stdout()
    chosen = next(size for size in report.sizes if size.tp_size == report.tp_size)
    verdict = "fits" if chosen.concurrency else f"does not fit one sequence of {report.max_model_len} tokens"
    console.print(f"tp {report.tp_size} {verdict}; each rank:", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("ranks", "parameters", "heads q/kv", "weights", "activations", "KV cache", "KV tokens")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    alike: dict[RankFit, list[int]] = {}
    for rank in report.ranks:
        alike.setdefault(replace(rank, rank=0), []).append(rank.rank)
    for rank, members in alike.items():
        table.add_row(
            describe_ranks(members).split(" ", 1)[1],
            f"{rank.parameters:,}",
            f"{rank.query_heads}/{rank.kv_heads}",
            _gib(rank.weight_bytes),
            _gib(rank.activation_bytes),
            _gib(rank.kv_cache_bytes) if rank.kv_cache_bytes > 0 else "none",
            f"{max(0, rank.kv_cache_bytes // rank.kv_bytes_per_token):,}",
        )
    console.print(table)
    usable = int(report.gpu_memory * report.utilization)
    console.print(
        f"KV cache: what is left of {_gib(usable)} ({report.utilization:.0%} of {_gib(report.gpu_memory)}) after "
        f"weights, activations, {_gib(report.context_bytes)} for the CUDA context, libraries and NCCL, and "
        f"{_gib(report.reserve_bytes)} kept for CUDA graphs and fragmentation; the last three are estimates",
        soft_wrap=True,
    )


def _gib(count: int) -> str:
    """``count`` bytes in GiB, or in MiB where that says more."""
    return f"{count / 2**30:.1f} GiB" if count >= 10 << 30 else f"{count / 2**20:.0f} MiB"
