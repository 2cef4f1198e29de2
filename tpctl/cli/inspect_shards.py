"""``tpctl inspect-shards``: what each rank holds, how it was cut, and whether it is still so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import byte_progress, note, print_json, say, stdout
from tpctl.cli.shard import how_cut
from tpctl.errors import ShardFolderError, counted, format_bytes, printable
from tpctl.manifest.manifest import describe_ranks

if TYPE_CHECKING:
    from tpctl.sharding.showing.report import InspectReport, PieceReport, TensorReport

MOST_GROUPS = 20
"""Kinds of tensors beside the model that are listed."""


def inspect_shards(
    folder: Annotated[Path, typer.Argument(help="A shard folder.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Only this rank, every tensor of it.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every byte; compare with the source if it is at hand.")
    ] = False,
    source: Annotated[str | None, typer.Option(help="Compare every element with this model (any MODEL form).")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that shows and explains every cut.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Show what each rank of a shard folder holds and how every weight was cut; --verify proves it."""
    from tpctl.arch.config import ModelConfig
    from tpctl.checkpoint.sources import made_of, resolve
    from tpctl.quantizing.cache import as_cut
    from tpctl.sharding.proving.at_hand import sources_at_hand
    from tpctl.sharding.proving.damage import load_manifest
    from tpctl.sharding.showing.inspect import inspect_shards as inspect
    from tpctl.sharding.showing.page import write_page

    manifest = load_manifest(folder, verify=verify)
    origins: Sequence[Path] = ()
    if source is not None:
        given = resolve(source)
        with byte_progress("quantising") as progress:
            found = as_cut(given, manifest.source.id, progress=progress)
        if found is not given:
            note(f"the shards were quantised before they were cut, so they are compared with {found.id}")
        origins = (found.folder,)
    elif verify:
        origins = sources_at_hand(manifest)
    with byte_progress("verifying") as progress:
        ranks = None if rank is None else [rank]
        report = _equal_to_one(
            [partial(inspect, folder, ranks=ranks, verify=verify, source=one, progress=progress) for one in origins]
            or [partial(inspect, folder, ranks=ranks, verify=verify, progress=progress)]
        )
    if html is not None:
        write_page(report if rank is None else inspect(folder), ModelConfig.load(folder), html)
        note(f"wrote {html}")
    if json:
        print_json(asdict(report))
    else:
        _print(report, detail=rank is not None)
    if verify and not origins:
        name, made = printable(manifest.source.id), made_of(manifest.source.id)
        again = "" if made is None else ", and the original quantised again"
        note(f"not compared: {name} is not at hand; --source MODEL compares every element with it{again}")


def _equal_to_one(attempts: Sequence[Callable[[], InspectReport]]) -> InspectReport:
    """The report of the first of ``attempts`` that finds nothing wrong; raises as the first one if all do."""
    failure: ShardFolderError | None = None
    for attempt in attempts:
        try:
            return attempt()
        except ShardFolderError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _print(report: InspectReport, detail: bool) -> None:
    from tpctl.sharding.showing.rules import entry

    revision = f"@{report.revision}" if report.revision else ""
    dtype = f", cast to {report.dtype}" if report.dtype else ""
    source = f"{report.source}{revision} ({report.model_type})"
    how = how_cut(report.expert_parallel, even=report.even)
    say(f"{report.folder}: {source} cut for tp {report.tp_size}{how}{dtype}")
    say()
    for rank in report.ranks:
        files = counted(len(rank.files), "file")
        size = format_bytes(rank.nbytes)
        absent = "  not here" if rank.rank in report.absent else ""
        say(f"rank {rank.rank:<3} {rank.parameters:>16,} parameters  {size:>10}  {files}{absent}")
    if report.imbalance > 1.005:
        say(
            f"uneven: the largest rank holds {report.imbalance - 1:.1%} more than the mean, "
            f"and every step waits for it: about {report.imbalance - 1:.1%} longer than with an even cut"
        )
    if report.replicated_bytes:
        say(f"copies: {format_bytes(report.replicated_bytes)} are held by more than one rank")
    if report.extra:
        total = format_bytes(sum(one.nbytes for one in report.extra))
        say(f"beside the model: {counted(len(report.extra), 'tensor')}, {total}, that no rank needs")
    if report.absent:
        say(f"not here: the files of {describe_ranks(report.absent)}; what is said of them is the manifest's word")
    if report.strays:
        say(f"stray: {', '.join(report.strays)} (not in the manifest; an engine may load what lies there, remove it)")
    say()
    if detail:
        for tensor in report.ranks[0].tensors:
            stands = f"  ({entry(tensor.holds)})" if tensor.holds else ""
            say(f"{tensor.name}  {tensor.rule}  {tensor.dtype} {_shape(tensor)}{stands}  {tensor.file}")
            say(f"    {_pieces(tensor)}")
    else:
        _draw(report)
        _list_extra(report)
    if report.verified is not None:
        if report.verified.hashed_bytes:
            say(f"verified: {format_bytes(report.verified.hashed_bytes)} match their digests")
        if report.verified.compared_bytes:
            say(f"verified: {format_bytes(report.verified.compared_bytes)} equal {report.verified.source}")
        if report.verified.left_out:
            say(f"not verified: {'; '.join(report.verified.left_out)}")


def _draw(report: InspectReport) -> None:
    """Every kind of weight once, as a picture: layers that are cut alike share it."""
    from tpctl.arch.config import ModelConfig
    from tpctl.sharding.showing.kinds import kinds
    from tpctl.sharding.showing.picture import draw

    blueprint = ModelConfig.load(Path(report.folder)).blueprint
    stdout().print(draw(kinds(report), blueprint, report.tp_size), soft_wrap=True)
    say()


def _list_extra(report: InspectReport) -> None:
    """What no rank needs, by name and size."""
    from tpctl.sharding.showing.extra import apart

    groups = apart(report.extra)
    for group in groups[:MOST_GROUPS]:
        each = f"{counted(group.count, 'tensor')}, each {group.shape}" if group.count > 1 else group.shape
        say(f"no rank needs {printable(group.name)}  {group.dtype} {each}  {format_bytes(group.nbytes)}")
    if len(groups) > MOST_GROUPS:
        say(f"and {len(groups) - MOST_GROUPS} more kinds of them, which --json lists")
    if groups:
        say()


def _shape(tensor: TensorReport) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _pieces(tensor: TensorReport) -> str:
    if tensor.fill:
        return f"the constant {tensor.fill}, which another engine expects"
    rows = tensor.padding // max(1, tensor.shape[-1])
    padding = f" + {counted(rows, 'row')} of zeros" if tensor.padding else ""
    return " + ".join(_piece(piece, tensor.dim, tensor.stacked) for piece in tensor.pieces) + padding


def _piece(piece: PieceReport, dim: int, stacked: bool) -> str:
    """``mlp.experts.{}.gate_proj.weight[0:64, 0:384]``: of experts, the first index is theirs."""
    first, stop = piece.ranges[dim] if piece.ranges else (0, 1)
    experts = f"{piece.ranges[0][0]}:{piece.ranges[0][1]}, " if stacked else ""
    rest = experts + ":, " * (dim - stacked)
    name = re.sub(r"^model\.layers\.\d+\.", "", piece.source)
    return f"{name}[{rest}{first}:{stop}]"
