"""``tpctl shard``: cut a checkpoint into one file set per tensor-parallel rank."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import byte_progress, note, print_json, say
from tpctl.cli.options import CuttingOptions, grouped
from tpctl.cli.units import parse_bytes, parse_ranks
from tpctl.errors import UsageError, counted, format_bytes
from tpctl.quantizing.schemes import Method

if TYPE_CHECKING:
    from tpctl.quantizing.writer import QuantizationReport
    from tpctl.sharding.cutting.writer import ShardReport


@grouped
def shard(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint folder, .gguf file, pypi:NAME or demo.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel size: the number of shards.")],
    cut: CuttingOptions,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to make. Default: ./NAME-tpN")] = None,
    dtype: Annotated[str, typer.Option(help="Cast floats: auto (keep), float32, bfloat16, float16.")] = "auto",
    quantize: Annotated[
        Method | None,
        typer.Option(
            help="Quantise the layers' linears first: fp8 (a scale a row), fp8-block (128 x 128), int4 (groups of "
            "128), int4-g64 or int4-g32, in compressed-tensors' format."
        ),
    ] = None,
    allow_overflow: Annotated[
        bool, typer.Option("--allow-overflow", help="Make values beyond the range of --dtype infinite.")
    ] = False,
    max_part_size: Annotated[str, typer.Option(help="Most tensor bytes in one file.")] = "5GB",
    ranks: Annotated[
        str | None, typer.Option(help="Write only these ranks, e.g. 0-3; added to the folder if it holds others.")
    ] = None,
    compat: Annotated[
        str | None, typer.Option(help='Make it loadable by vllm or sglang too (load_format="sharded_state").')
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Of a model that also sees or hears, cut the text model.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token; default: the one `hf auth login` stored.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Cut a checkpoint into shards: one set of safetensors files a rank, with a manifest that proves them."""
    part_size, wanted, cutting = parse_bytes(max_part_size), parse_ranks(ranks), cut.cutting(tp)
    if quantize is not None and dtype != "auto":
        raise UsageError(
            f"--quantize {quantize} keeps the dtype of all that it does not quantise, but --dtype {dtype} changes it; "
            "leave one of them out"
        )
    from tpctl.checkpoint.cache import file_name
    from tpctl.client.prepare import supported_source
    from tpctl.sharding.cutting.shard import shard_checkpoint
    from tpctl.sharding.publishing.pending import refuse_existing

    if output is not None:
        refuse_existing(output, force, add=wanted is not None)
    source = supported_source(
        model, tp, cutting=cutting, text_only=text_only, revision=revision, token=token, progress=byte_progress
    )
    name = file_name(Path(source.id).name)
    out = output or Path(f"{name}-tp{tp}" if quantize is None else f"{name}-{quantize}-tp{tp}")
    quantised = None
    if quantize is not None:
        from tpctl.quantizing.cache import ensure_quantised

        refuse_existing(out, force, add=wanted is not None)
        with byte_progress("quantising") as progress:
            quantised = ensure_quantised(source, quantize, progress=progress)
        source = quantised.source
    with byte_progress("sharding") as progress:
        report = shard_checkpoint(
            source.folder,
            out,
            tp,
            source_id=source.id,
            revision=source.revision,
            dtype=dtype,
            allow_overflow=allow_overflow,
            max_part_size=part_size,
            ranks=wanted,
            compat=compat,
            cutting=cutting,
            text_only=text_only,
            force=force,
            progress=progress,
        )
    if json:
        print_json(asdict(report) | ({} if quantised is None else {"quantization": asdict(quantised.report)}))
    else:
        if quantised is not None:
            print_losses(quantised.report)
        print_report(report)


def print_losses(report: QuantizationReport) -> None:
    """What quantising has saved and changed, as text: the middle of all weights, and the five that lost most."""
    before, after = format_bytes(report.bytes_before), format_bytes(report.bytes_after)
    say(f"{counted(len(report.tensors), 'weight')} quantised to {report.method}: {before} before, {after} after")
    say(f"  {'relative error':>14}  {'largest':>9}")
    relative = median(one.relative for one in report.tensors)
    say(f"  {relative:>14.3%}  {median(one.largest for one in report.tensors):>9.2g}  median")
    for one in sorted(report.tensors, key=lambda one: -one.relative)[:5]:
        say(f"  {one.relative:>14.3%}  {one.largest:>9.2g}  {one.name}")


def how_cut(expert_parallel: int, *, even: bool) -> str:
    """What is said of a cut behind its size, where experts are dealt or borders need not be where blocks end."""
    dealt = f", experts dealt to {expert_parallel} groups of ranks" if expert_parallel > 1 else ""
    return dealt + (", evenly: borders may divide blocks of a scale" if even else "")


def print_report(report: ShardReport) -> None:
    """What was written, as text."""
    from tpctl.manifest.manifest import describe_ranks, rank_list

    total = sum(report.bytes_per_rank.values())
    dtype = f", cast to {report.dtype}" if report.dtype else ""
    how = how_cut(report.expert_parallel, even=report.even)
    say(f"{report.folder}: {report.source} ({report.model_type}) cut for tp {report.tp_size}{how}{dtype}")
    files, tensors = counted(report.files, "file"), counted(report.tensors_per_rank, "tensor")
    say(f"{files}, {format_bytes(total)}, {tensors} a rank")
    for rank, size in report.bytes_per_rank.items():
        say(f"  rank {rank}  {format_bytes(size)}")
    if report.imbalance > 1.005:
        say(f"the largest rank holds {report.imbalance - 1:.1%} more than the mean")
    if report.missing_ranks:
        missing, ranks = describe_ranks(report.missing_ranks), rank_list(report.missing_ranks)
        say(f"missing of tp {report.tp_size}: {missing}; add with --ranks {ranks} and the same folder")
    if report.dropped_bytes:
        left = format_bytes(report.dropped_bytes)
        say(f"dropped: {left} that an unfinished run left, of another source, revision or set of options")
    if report.resumed_bytes:
        say(f"resumed: {format_bytes(report.resumed_bytes)} were complete already")


def note_left_behind(folder: Path) -> None:
    """Name what lies in a shard folder but is no part of it."""
    from tpctl.manifest.manifest import MANIFEST
    from tpctl.sharding.moving.contents import left_behind

    if names := left_behind(folder):
        more = f" and {counted(len(names) - 3, 'more file')}" if len(names) > 3 else ""
        are, stay = ("is", "stays") if len(names) == 1 else ("are", "stay")
        note(f"{', '.join(names[:3])}{more} {are} not listed in {folder / MANIFEST} and {stay} behind")
