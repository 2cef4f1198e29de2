"""What ``tpctl plan`` prints: how a model can be cut, what fits, and what else loads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from tpctl.attention_choice import KINDS
from tpctl.cli.console import stdout
from tpctl.cli.options import KV_FORMS
from tpctl.cli.shard import how_cut
from tpctl.errors import counted
from tpctl.manifest.manifest import describe_ranks, rank_list
from tpctl.planning.check import SizeCheck
from tpctl.planning.gpus import GPUS, Gpu
from tpctl.planning.peers import ENGINES, Objection
from tpctl.planning.report import FitReport, RankFit


def print_report(report: FitReport) -> None:
    """All of it."""
    _print_model(report)
    _print_sizes(report)
    if report.gpu is not None:
        _print_speed(report, GPUS[report.gpu])
    _print_checks(report)
    _print_ranks(report)


def _print_model(report: FitReport) -> None:
    console = stdout()
    revision = f"@{report.revision[:12]}" if report.revision else ""
    origin = "from the weight files' headers" if report.exact else "from config.json alone"
    active = (
        f"{report.active_parameters / 1e6:,.1f} M of them for a token, "
        if report.active_parameters < report.parameters
        else ""
    )
    console.print(
        f"{report.model}{revision} ({report.model_type}): {report.parameters / 1e6:,.1f} M parameters, {active}"
        f"{_gib(report.source_bytes)} as stored, {origin}",
        soft_wrap=True,
    )
    console.print(
        f"on GPUs of {_gib(report.gpu_memory)}, {report.utilization:.0%} used: sequences of up to "
        f"{report.max_model_len} tokens, {report.max_num_batched_tokens} tokens a step, {report.dtype}"
        f"{', ' + KV_FORMS[report.kv_cache_dtype] if report.kv_cache_dtype in KV_FORMS else ''}"
        f"{'' if report.attention_backend == 'triton' else f', {report.attention_backend} attention'}",
        soft_wrap=True,
    )
    for line in _remarks(report):
        console.print(line, soft_wrap=True)
    console.print()


def _remarks(report: FitReport) -> Iterator[str]:
    """What of the model is counted otherwise than one may think."""
    if report.not_run is not None:
        yield f"tpctl cuts the model but does not run it yet, for it has {report.not_run}"
    elif report.not_on_gpus is not None:
        yield f"tpctl runs the model on CPUs and not on GPUs yet, for it has {report.not_on_gpus}"
    if report.beside:
        yield f"left out: {counted(report.beside, 'tensor')} of what sees or hears (`tpctl shard --text-only`)"
    if more := max(rank.predictor_bytes for rank in report.ranks):
        kept = max(rank.predictor_kv_bytes_per_token for rank in report.ranks)
        yield (
            f"a layer that predicts more tokens is cut, too: {_gib(more)} a rank, and {kept / 1024:.1f} KiB of the "
            "cache a token, which `tpctl chat` takes where it speculates by it; they are not counted below"
        )
    if report.recurrent:
        rank = max(report.ranks, key=lambda rank: rank.state_bytes)
        states = f": {_gib(rank.state_bytes // rank.states)} a rank" if rank.states else ""
        yield (
            f"{report.recurrent} of {counted(report.layers, 'layer')} keep no keys and values but a state of constant "
            f"size for each sequence{states}; half of the cache is for states at most"
        )
    if report.reading:
        yield (
            f"{report.reading} of {counted(report.layers, 'layer')} read the keys and values of earlier ones, and keep "
            "none"
        )
    if report.windowed:
        rank = max(report.ranks, key=lambda rank: rank.window_bytes)
        yield (
            f"{report.windowed} of {counted(report.layers, 'layer')} look back {report.window} tokens at most and keep "
            + (
                f"no more of a sequence, {_gib(rank.window_bytes)} a rank; KV/token is what the others keep"
                if rank.window_bytes
                else "the keys and values of all the same, for layers differ in what they keep of a token"
            )
        )


def _print_sizes(report: FitReport) -> None:
    console, table = stdout(), Table(box=None, pad_edge=False, header_style="bold")
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


def _print_speed(report: FitReport, gpu: Gpu) -> None:
    """The least time that a token takes, since the weights it needs must be read."""
    console, table = stdout(), Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tp", "read a token", "ms a token", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for size in report.sizes:
        seconds = size.read_bytes / gpu.bandwidth
        table.add_row(str(size.tp_size), _gib(size.read_bytes), f"{seconds * 1e3:.2f}", f"{1 / seconds:,.0f}")
    console.print(f"a token of one sequence on {gpu.title}, {gpu.bandwidth / 1e12:.3g} TB/s, takes at least:")
    console.print(table)
    console.print(
        "by the weights that the rank with most reads: the context, sums over ranks and the kernels' own time come "
        f"on top ({gpu.source})\n",
        soft_wrap=True,
    )


def _print_checks(report: FitReport) -> None:
    """Every size; those of which the same is to be said share a line."""
    console, table = stdout(), Table(box=None, pad_edge=False, header_style="bold")
    alike: dict[tuple[str, str, str], list[SizeCheck]] = {}
    for check in report.checks:
        alike.setdefault((check.verdict, _word(check.vllm), _word(check.sglang)), []).append(check)
    table.add_column("tp", max_width=18)
    for title in ("slower", "copies", "scales"):
        table.add_column(title, justify="right", no_wrap=True)
    for engine in ENGINES.values():
        table.add_column(f"{engine.split()[0]} refuses", no_wrap=True)
    for (verdict, *engines), checks in alike.items():
        table.add_row(
            rank_list(check.tp_size for check in checks).replace(",", ", "),
            _span([check.imbalance - 1 for check in checks], "{:.1%}") if verdict == "uneven" else verdict,
            _span([check.kv_copies for check in checks], "{:.3g}", least=1),
            _span([check.scale_copies / 2**20 for check in checks], "{:.0f} MiB"),
            *engines,
        )
    console.print(f"every size, and what others refuse to load at it ({', '.join(ENGINES.values())}):")
    console.print(table)
    if any(check.scale_copies for check in report.checks):
        console.print("scales: copies, over all ranks, of those of blocks that a border divides", soft_wrap=True)
    for line in _reasons(report.checks):
        console.print(line, soft_wrap=True)
    console.print()


def _first(objections: Sequence[Objection]) -> Objection | None:
    """What decides: the first reason not to load the model, or else the first drawback."""
    return next((one for one in objections if not one.loads), next(iter(objections), None))


def _word(objections: Sequence[Objection]) -> str:
    """What an engine says to a size, short; what it loads with a drawback is in brackets."""
    first = _first(objections)
    return "" if first is None else f"({first.rule})" if first.loads else first.rule


def _span(values: Sequence[float], form: str, least: float = 0) -> str:
    """The values' range; nothing where none is above ``least``."""
    if max(values) <= least:
        return ""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low.removesuffix('%').removesuffix(' MiB')}-{high}"


def _reasons(checks: Sequence[SizeCheck]) -> Iterator[str]:
    """Each reason that is named, with the first size that has it."""
    found: dict[str, tuple[int, str]] = {}
    sources: dict[str, list[str]] = {}
    for check in checks:
        for one in (_first(check.vllm), _first(check.sglang)):
            if one is not None:
                found.setdefault(one.rule, (check.tp_size, one.why))
                if one.source not in sources.setdefault(one.rule, []):
                    sources[one.rule].append(one.source)
    impossible: dict[str, list[SizeCheck]] = {}
    for check in checks:
        if check.why is not None:  # the same of several sizes, but for the numbers in it
            impossible.setdefault(re.sub(r"\d+(, \d+)*", "0", check.why), []).append(check)
    for alike in impossible.values():
        sizes, first = rank_list(check.tp_size for check in alike).replace(",", ", "), alike[0]
        if len(alike) == 1:
            yield f"tp {sizes} is impossible: {first.why}"
        else:
            yield f"tp {sizes} are impossible; of tp {first.tp_size}: {first.why}"
    for rule, (tp_size, why) in found.items():
        yield f"{rule}: at tp {tp_size} {why} ({'; '.join(sources[rule])})"


def _print_ranks(report: FitReport) -> None:
    """The detailed size; ranks that hold the same share a line."""
    console = stdout()
    chosen = next(size for size in report.sizes if size.tp_size == report.tp_size)
    verdict = "fits" if chosen.concurrency else f"does not fit one sequence of {report.max_model_len} tokens"
    how = how_cut(report.expert_parallel, even=report.even)
    console.print(f"tp {report.tp_size} {verdict}{how}; each rank:", soft_wrap=True)
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
            _kv_tokens(rank),
        )
    console.print(table)
    if more := max(rank.growth_bytes for rank in report.ranks):
        console.print(
            f"weights take up to {_gib(more)} more than stored when they run: codes of 2 bits become codes of 4, and "
            "packed zero points one or two bytes each; what is left for the KV cache is less by that",
            soft_wrap=True,
        )
    usable = int(report.gpu_memory * report.utilization)
    paged = KINDS[report.attention_backend].paged
    console.print(
        f"KV cache: {'what' if paged else 'half of what'} is left of {_gib(usable)} ({report.utilization:.0%} of "
        f"{_gib(report.gpu_memory)}) after weights, {'activations, ' if paged else ''}{_gib(report.context_bytes)} for "
        f"the CUDA context, libraries and NCCL, and {_gib(report.reserve_bytes)} kept for CUDA graphs and "
        f"fragmentation{'; the last three are estimates' if paged else ', both estimates; the rest is for steps'}",
        soft_wrap=True,
    )


def _kv_tokens(rank: RankFit) -> str:
    """Tokens that a rank's KV cache holds; where layers have windows, of one sequence."""
    left = max(0, rank.kv_cache_bytes - rank.window_bytes)
    return f"{left // rank.kv_bytes_per_token:,}" if rank.kv_bytes_per_token else "any" if left else "0"


def _gib(count: int) -> str:
    """``count`` bytes in GiB, or in MiB where that says more."""
    return f"{count / 2**30:.1f} GiB" if count >= 10 << 30 else f"{count / 2**20:.0f} MiB"
