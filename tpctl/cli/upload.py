"""``tpctl upload``: put a shard or checkpoint folder on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tpctl.cli.console import print_json


def upload(
    folder: Annotated[Path, typer.Argument(help="Shard folder or checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, org/name; made if it does not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch to commit to. Default: main.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload with tpctl",
    token: Annotated[str | None, typer.Option(help="Hub token; default: the one `hf auth login` stored.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was uploaded as JSON.")] = False,
) -> None:
    """Upload a folder to the Hub, from where `tpctl download` (with --local-ranks, say) can fetch it."""
    from tpctl.checkpoint.upload import upload_folder

    report = upload_folder(folder, repo, revision=revision, private=private, message=message, token=token)
    if json:
        print_json(asdict(report))
    else:
        print(report.url)
