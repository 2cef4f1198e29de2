"""``tpctl merge``: shards back into the checkpoint that they were cut from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tpctl.cli.console import byte_progress, print_json, say
from tpctl.cli.shard import note_left_behind
from tpctl.errors import counted, format_bytes


def merge(
    folder: Annotated[Path, typer.Argument(help="A shard folder that holds every rank.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Put shards together again: the Hugging Face checkpoint they were cut from, byte for byte."""
    from tpctl.sharding.cutting.merge import merge_shards

    with byte_progress("merging") as progress:
        report = merge_shards(folder, output, force=force, progress=progress)
    note_left_behind(folder)
    if json:
        print_json(asdict(report))
        return
    kind = "byte for byte the source" if report.exact else "in the dtype that the shards were cast to"
    say(f"{report.folder}: {report.source}, {kind}")
    files, tensors = counted(len(report.files), "file"), counted(report.tensors, "tensor")
    say(f"{files}, {format_bytes(report.nbytes)}, {tensors}")
