"""``tpctl reshard``: from N ranks to M, from the shards alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tpctl.cli.console import byte_progress, print_json
from tpctl.cli.options import CuttingOptions, grouped
from tpctl.cli.shard import note_left_behind, print_report
from tpctl.cli.units import parse_bytes, parse_ranks


@grouped
def reshard(
    folder: Annotated[Path, typer.Argument(help="A shard folder that holds every rank.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="The new tensor-parallel size.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.")],
    cut: CuttingOptions,
    max_part_size: Annotated[
        str | None, typer.Option(help="Most tensor bytes in one file. Default: as in FOLDER.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Write only these ranks, e.g. 0-3; added to the folder if it holds others.")
    ] = None,
    compat: Annotated[
        str | None, typer.Option(help="Make it loadable by vllm or sglang too, or none. Default: as FOLDER is.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Cut shards anew for another number of ranks, equal to sharding the source at that size.

    Experts are dealt, and borders are, as in FOLDER unless options say otherwise.
    """
    part_size = None if max_part_size is None else parse_bytes(max_part_size)
    wanted = parse_ranks(ranks)
    from tpctl.arch.quantised import Cutting
    from tpctl.manifest.manifest import Manifest
    from tpctl.sharding.cutting.reshard import reshard as run

    cutting = None
    if cut != CuttingOptions():
        manifest = Manifest.load(folder)
        cutting = cut.cutting(tp, Cutting(manifest.expert_parallel, manifest.even))
    with byte_progress("resharding") as progress:
        report = run(
            folder,
            output,
            tp,
            max_part_size=part_size,
            ranks=wanted,
            compat=compat,
            cutting=cutting,
            force=force,
            progress=progress,
        )
    note_left_behind(folder)
    if json:
        print_json(asdict(report))
    else:
        print_report(report)
