"""One self-contained HTML page that shows and explains how a shard folder was cut.

The page needs no network and no server: styles, script, figures (SVG) and data are inside. Its size hardly depends
on the number of layers, since layers that are cut alike are written once.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.checkpoint.outputs import resolved, write_whole
from tpctl.errors import ShardFolderError, format_bytes, printable
from tpctl.manifest.manifest import describe_ranks
from tpctl.partition.split import Rule
from tpctl.sharding.showing.inspect import InspectReport
from tpctl.sharding.showing.kinds import Kind, count, kinds, layer_of, pattern
from tpctl.sharding.showing.page_flow import block_flow, column_example, row_example
from tpctl.sharding.showing.page_svg import figure, hue
from tpctl.sharding.showing.rules import RULE_TEXTS


def write_page(report: InspectReport, config: ModelConfig, path: Path) -> None:
    """Write the page for ``report`` to ``path``.

    Raises:
        ShardFolderError: ``path`` cannot be written, or is a file that is no page.
    """
    resolved(path, "--html")
    if path.exists() and path.suffix.lower() not in (".html", ".htm"):  # a slip must not cost a manifest or weights
        raise ShardFolderError(f"{path} exists and is no .html file; choose another file for --html")
    text = render(report, config).encode()
    try:
        write_whole(resolved(path, "--html"), text)
    except OSError as error:
        gone = error.errno == errno.ENOENT and not path.absolute().parent.is_dir()
        reason = "its folder does not exist" if gone else error.strerror
        raise ShardFolderError(f"cannot write {path}: {reason}; choose another file for --html") from None


def render(report: InspectReport, config: ModelConfig) -> str:
    """The page's HTML."""
    found = kinds(report)
    revision = f" at revision {printable(report.revision)}" if report.revision else ""
    title = f"{printable(report.source)}, cut for {report.tp_size} rank{'s' if report.tp_size > 1 else ''}"
    total = sum(rank.nbytes for rank in report.ranks)
    heads = config.blueprint.blocks[0].attention
    parts = {
        "title": escape(title),
        "css": _template("page.css"),
        "js": _template("page.js"),
        "summary": escape(
            f"A {report.model_type} model{revision} with {config.num_layers} blocks (layers), {heads.num_heads} query "
            f"and {heads.num_kv_heads} KV heads, in {format_bytes(total)} of shards. This page shows which rank "
            "holds which part of every weight, and why it was cut that way."
        ),
        "legend": _legend(report),
        "column": column_example(),
        "row": row_example(),
        "layers": str(config.num_layers),
        "flow": block_flow(config.blueprint, found),
        "balance": _balance(report, found),
        "ranks": _rank_rows(report, found, heads.head_dim),
        "kinds": "".join(_kind(kind) for kind in found),
        "footer": escape(f"Made by tpctl inspect-shards from {printable(Path(report.folder).name)}/tpctl.json."),
        # "</script" would end the script element early, "<!--" keep it from ending, whatever string they are in.
        "data": json.dumps(_data(report, found), separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _template("page.html"))


def _template(name: str) -> str:
    return files("tpctl.sharding.showing").joinpath(name).read_text(encoding="utf-8")


def _legend(report: InspectReport) -> str:
    ranks = [rank.rank for rank in report.ranks]
    return " ".join(f'<button aria-pressed="false"{_colour(rank)}>{rank}</button>' for rank in ranks)


def _balance(report: InspectReport, found: Sequence[Kind]) -> str:
    lines = []
    if report.imbalance > 1.005:
        lines.append(
            f"The split is uneven: the largest rank holds {report.imbalance - 1:.1%} more than the mean. All "
            "ranks wait for it in every step, which is what an uneven split costs; it is often still far better than "
            "not using the other devices."
        )
    elif report.tp_size > 1:
        lines.append("The split is even: every rank holds the same amount and none waits for another.")
    if report.replicated_bytes:
        kv = ", and KV heads, since there are more ranks than those" if any(kind.copied for kind in found) else ""
        lines.append(f"{format_bytes(report.replicated_bytes)} are copies: norms, which every rank needs whole{kv}.")
    if report.absent:
        lines.append(
            f"The files of {describe_ranks(report.absent)} are not in this folder; its manifest describes them."
        )
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _rank_rows(report: InspectReport, found: Sequence[Kind], head_dim: int) -> str:
    largest = max(rank.nbytes for rank in report.ranks)
    qkv = next(kind for kind in found if kind.rule == "qkv")
    rows = []
    for index, rank in enumerate(report.ranks):
        query, kv = ((stop - start) // head_dim for _, start, stop in qkv.pieces[index][:2])
        share = 100 * rank.nbytes / largest
        rows.append(
            f"<tr><td><span class='chip'{_colour(rank.rank)}>{rank.rank}</span></td><td>{rank.parameters:,}</td>"
            f"<td>{format_bytes(rank.nbytes)}</td>"
            f"<td class='meter'><i{_colour(rank.rank, f'width:{share:.1f}%')}></i></td>"
            f"<td>{query} / {kv}</td><td>{len(rank.files)}</td></tr>"
        )
    return "".join(rows)


def _kind(kind: Kind) -> str:
    tags = [f"<span class='tag'>{escape(kind.rule)}</span>"]
    if layers := count(kind.layers):
        tags.append(f"<span class='tag'>{layers}</span>")
    if kind.uneven:
        tags.append("<span class='tag mark'>uneven</span>")
    explained = RULE_TEXTS[Rule(kind.rule)].paragraph
    if kind.copied:
        explained += " There are fewer KV heads than ranks: piled up like cards are copies, each of them whole."
        tags.append(f"<span class='tag mark'>KV heads on {kind.copies} ranks</span>")
    return (
        f"<figure class='kind'><div class='head'><h3>{escape(kind.name)}</h3>{' '.join(tags)}</div>"
        f"<div><p>{escape(explained)}</p><div class='scroll'>{figure(kind)}</div></div></figure>"
    )


def _data(report: InspectReport, found: Sequence[Kind]) -> dict[str, Any]:
    """What the search needs: every kind once, with the part file of each of its layers."""
    parts = _parts(report)
    return {
        "ranks": [{"rank": rank.rank, "hue": hue(rank.rank)} for rank in report.ranks],
        "order": list(dict.fromkeys(kind.name for kind in found)),
        "kinds": [
            {
                "name": kind.name,
                "rule": kind.rule,
                "dtype": kind.dtype,
                "layers": kind.layers,
                "parts": [parts[kind.name, layer] for layer in (kind.layers or (None,))],
                "shapes": kind.shapes,
                "ranges": [kind.ranges(index) for index in range(len(kind.ranks))],
                "bytes": kind.nbytes,
            }
            for kind in found
        ],
    }


def _parts(report: InspectReport) -> Mapping[tuple[str, int | None], int]:
    """The part file's number of every tensor; it is the same on every rank."""
    return {
        (pattern(tensor.name), layer_of(tensor.name)): int(tensor.file.rpartition("-")[2].partition(".")[0])
        for tensor in report.ranks[0].tensors
    }


def _colour(rank: int, style: str = "") -> str:
    return f' data-r="{rank}" style="--h:{hue(rank)};{style}"'
