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
from tpctl.arch.source_plan import as_held
from tpctl.checkpoint.outputs import resolved, write_whole
from tpctl.errors import ShardFolderError, format_bytes, printable
from tpctl.sharding.showing import page_sections as sections
from tpctl.sharding.showing.kinds import Kind, flat, kinds, layer_of, pattern
from tpctl.sharding.showing.page_flow import block_flow, column_example, row_example
from tpctl.sharding.showing.report import InspectReport
from tpctl.sharding.showing.svg import hue


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
    blueprint = as_held(config, report.source_shapes).blueprint
    mixers = sections.mixers_of(blueprint)
    revision = f" at revision {printable(report.revision)}" if report.revision else ""
    title = f"{printable(report.source)}, cut for {report.tp_size} rank{'s' if report.tp_size > 1 else ''}"
    total = sum(rank.nbytes for rank in report.ranks)
    flow = block_flow(blueprint, found, report.tp_size)
    parts = {
        "title": escape(title),
        "css": _template("page.css"),
        "js": _template("page.js"),
        "summary": escape(
            f"A {report.model_type} model{revision} with {config.num_layers} blocks (layers), "
            f"{sections.heads_of(mixers)}{sections.experts_of(blueprint)}, in {format_bytes(total)} of shards. This "
            "page shows which rank holds which part of every weight, and why it was cut that way."
        ),
        "legend": _legend(report),
        "column": column_example(),
        "row": row_example(),
        "layers": str(config.num_layers),
        "alike": flow.alike,
        "parts": flow.parts,
        "reduces": flow.reduces,
        "more": sections.more(blueprint, report),
        "flow": flow.figures,
        "balance": sections.balance(report, found),
        "columns": "".join(f"<th>{escape(title)}</th>" for title in sections.columns(mixers, found)),
        "ranks": sections.rank_rows(report, found, mixers),
        "kinds": "".join(sections.kind_figure(kind) for kind in found),
        "extra": sections.extra(report),
        "footer": escape(f"Made by tpctl inspect-shards from {printable(Path(report.folder).name)}/tpctl.json."),
        # "</script" would end the script element early, "<!--" keep it from ending, whatever string they are in.
        "data": json.dumps(_data(report, found), separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _template("page.html"))


def _template(name: str) -> str:
    return files("tpctl.sharding.showing").joinpath(name).read_text(encoding="utf-8")


def _legend(report: InspectReport) -> str:
    ranks = [rank.rank for rank in report.ranks]
    return " ".join(f'<button aria-pressed="false"{sections.colour(rank)}>{rank}</button>' for rank in ranks)


def _data(report: InspectReport, found: Sequence[Kind]) -> dict[str, Any]:
    """What the search needs: every kind once, with the part file of each of its layers."""
    parts = _parts(report)
    return {
        "ranks": [{"rank": rank.rank, "hue": hue(rank.rank)} for rank in report.ranks],
        "order": list(dict.fromkeys(kind.name for kind in flat(found))),
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
            for kind in flat(found)
        ],
    }


def _parts(report: InspectReport) -> Mapping[tuple[str, int | None], int]:
    """The part file's number of every tensor; it is the same on every rank."""
    return {
        (pattern(tensor.name), layer_of(tensor.name)): int(tensor.file.rpartition("-")[2].partition(".")[0])
        for tensor in report.ranks[0].tensors
    }
