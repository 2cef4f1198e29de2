"""``tpctl batch status``: how far a batch is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.batch_report import duration
from tpctl.cli.console import print_json, say
from tpctl.errors import counted

if TYPE_CHECKING:
    from tpctl.batch.status import BatchStatus


def batch_status(
    output: Annotated[Path, typer.Argument(help="Folder or file that a batch writes to.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the values as JSON.")] = False,
) -> None:
    """Say how far a batch over parts is: one that writes to a folder, or has several replicas.

    It reads the folder and disturbs nobody; from any host that sees it.
    """
    from tpctl.batch.status import read_status

    status = read_status(output)
    if as_json:
        print_json(asdict(status))
        return
    for line in _lines(status):
        say(line)


def _lines(status: BatchStatus) -> list[str]:
    of = f"{status.total:,}" if status.whole else f"about {status.total:,}"
    share = f" ({status.rows / status.total:.0%})" if status.total else ""
    reason = f": {status.reason}" if status.reason else ""
    found = [
        f"{status.state}{reason}",
        f"{status.rows:,} of {of} rows{share}, {counted(status.errors, 'error')}, {counted(status.parts, 'part')} done",
        f"{counted(status.prompt_tokens, 'token')} in, {status.completion_tokens:,} out",
        f"since {status.since}, {duration(status.seconds)}",
    ]
    if status.state == "running":
        working = sum(replica["state"] == "working" for replica in status.replicas)
        found.append(
            f"{status.prompt_tokens_per_second:,.0f} tok/s in, {status.tokens_per_second:,.0f} out, "
            f"{working} of {counted(max(status.wanted, len(status.replicas)), 'replica')} at work"
        )
        if status.pending:
            found.append(status.pending)
        found += [f"  {one['name']} on {one['host']}: {one['state']}, {one['rows']:,} rows" for one in status.replicas]
        if status.left is not None and status.end is not None:
            found.append(f"ends about {status.end}, in {duration(status.left)}")
    elif status.state != "done":
        found.append("go on with `tpctl batch … --resume`")
    return found
