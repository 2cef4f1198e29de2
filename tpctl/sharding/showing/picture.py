"""How weights are cut, drawn with characters: every matrix as a box whose cells name the rank that holds them.

    self_attn.qkv_proj  layers 0-29
      column-parallel: output rows divided in whole heads
      q [576, 576]              k [192, 576]              v [192, 576]
      ┌────────────────────┐    ┌────────────────────┐    ┌────────────────────┐
      │ 0000000000000000000│    │ 0000000000000000000│    │ 0000000000000000000│
      │ 0000000000000000000│    │ 0000000000000000000│    │ 0000000000000000000│
      │ 1111111111111111111│    │ 1111111111111111111│    │ 1111111111111111111│
      └────────────────────┘    └────────────────────┘    └────────────────────┘

Boxes show proportions along the cut axis, not sizes against each other. Cells held by several ranks alternate
between their names. Without colour the names alone carry the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tpctl.arch.blueprint import Blueprint
from tpctl.errors import counted, printable
from tpctl.partition.split import Rule
from tpctl.sharding.showing.bands import Band
from tpctl.sharding.showing.kinds import Kind, SourcePicture, count
from tpctl.sharding.showing.rules import entry, line, where

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

NAMES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow")
WIDTH, HEIGHT, MOST = 22, 6, 12
"""Cells of a box across and down; a box grows to one line a band, up to ``MOST`` lines."""


def draw(found: Sequence[Kind], blueprint: Blueprint, tp_size: int) -> Group:
    """Every kind as a picture, for a rich console; ``blueprint`` tells how many heads each of ``tp_size`` ranks has."""
    from rich.console import Group
    from rich.text import Text

    blocks: list[Text] = [_legend(found)]
    for kind in found:
        blocks += [Text(), *draw_kind(kind, blueprint, tp_size)]
    return Group(*blocks)


def draw_kind(kind: Kind, blueprint: Blueprint, tp_size: int) -> list[Text]:
    """One kind: a heading, its sources side by side, what each rank stores, and the scales beside it."""
    from rich.text import Text

    marks = " ".join(word for word, there in (("UNEVEN", kind.uneven), ("COPIES", kind.copied)) if there)
    lines = [
        Text.assemble((printable(kind.title), "bold"), "  ", count(kind.layers), "  ", (marks, "bold red")),
        Text(f"  {line(kind)}"),
    ]
    if kind.beside or kind.holds:
        lines.append(Text(f"  {kind.format}: {_tensor(kind)}"))
    boxes = [_experts(kind)] if kind.dealt else []
    if kind.cut or not kind.dealt:
        boxes += [_box(source, kind) for source in kind.sources]
    for row in range(max(map(len, boxes))):
        cells = [box[row] if row < len(box) else Text(" " * len(box[0])) for box in boxes]
        lines.append(Text("  ") + Text("   ").join(cells))
    return [*lines, *_stored(kind, blueprint, tp_size), *(_beside(other) for other in kind.beside)]


def _legend(found: Sequence[Kind]) -> Text:
    from rich.text import Text

    ranks = found[0].ranks
    text = Text("ranks ")
    for rank in ranks[: len(NAMES)]:
        text.append(f" {NAMES[min(rank, len(NAMES) - 1)]} ", style=_style(rank))
    if ranks[-1] >= len(NAMES):
        text.append(f" (from {len(NAMES) - 1} on drawn as {NAMES[-1]})")
    if any(not band.ranks for kind in found for source in kind.sources for band in source.bands):
        text.append("  · not in this folder")
    return text


def _experts(kind: Kind) -> list[Text]:
    """The experts as they are dealt, one below the other."""
    return _framed(f"experts [{kind.count}]", kind.experts, max(HEIGHT, min(len(kind.experts), MOST)), across=False)


def _box(source: SourcePicture, kind: Kind) -> list[Text]:
    """A source tensor: its caption, and a frame around its bands, which lie across or upright."""
    module, _, last = source.name.rpartition(".")
    suffix = "weight" in last or last == "bias"
    caption = f"{source.label or (module.rpartition('.')[2] if suffix else last)} [{', '.join(map(str, source.shape))}]"
    if kind.dealt:
        caption += f", one of {len(kind.experts[0])}"
    elif kind.experts:
        caption += f" x {kind.count}"
    if len(source.shape) == 1:
        return _framed(caption, source.bands, 1, across=True)
    return _framed(caption, source.bands, HEIGHT, across=kind.dim > 0)


def _framed(caption: str, bands: Sequence[Band], height: int, *, across: bool) -> list[Text]:
    """A caption and a frame around ``bands``, which lie beside each other (``across``) or one below the other."""
    from rich.text import Text

    width = max(WIDTH, len(caption) - 2)
    if across:
        rows = [_upright(bands, width, line) for line in range(height)]
    else:
        rows = _down(bands, min(max(height, len(bands)), MOST), width)
    frame = [Text("┌" + "─" * width + "┐"), *(Text("│") + row + Text("│") for row in rows)]
    return [Text(printable(caption).ljust(width + 2)), *frame, Text("└" + "─" * width + "┘")]


def _down(bands: Sequence[Band], height: int, width: int) -> list[Text]:
    lines = []
    for band, share in zip(bands, _shares([band.stop - band.start for band in bands], height), strict=True):
        lines += [_cells(band, width, line) for line in range(share)]
    return lines


def _upright(bands: Sequence[Band], width: int, line: int) -> Text:
    from rich.text import Text

    shares = _shares([band.stop - band.start for band in bands], width)
    return Text().join(_cells(band, share, line) for band, share in zip(bands, shares, strict=True))


def _cells(band: Band, width: int, line: int) -> Text:
    """``width`` cells of ``band``; ranks that share it alternate."""
    from rich.text import Text

    if not band.ranks:
        return Text("·" * width)
    text = Text()
    for cell in range(width):
        rank = band.ranks[(cell + line) % len(band.ranks)]
        text.append(NAMES[min(rank, len(NAMES) - 1)], style=_style(rank))
    return text


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """``total`` cells dealt in proportion to ``sizes``: at least one each while there are enough."""
    edges, done, whole = [0], 0, sum(sizes)
    for size in sizes:
        done += size
        edges.append(round(total * done / whole))
    shares = [stop - start for start, stop in pairwise(edges)]
    while 0 in shares and max(shares) > 1:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def _stored(kind: Kind, blueprint: Blueprint, tp_size: int) -> list[Text]:
    """What each rank stores."""
    from rich.text import Text

    if kind.rule == Rule.REPLICATED:
        return []
    lines = []
    for index, rank in enumerate(kind.ranks):
        rows = kind.padded_rows(index)
        notes = [f" + {counted(rows, 'row')} of zeros"] if rows else []
        if kind.rule == Rule.QKV:
            share = blueprint.layers[kind.layers[0]].mixer.shares(tp_size)[rank]
            notes.append(f"  ({len(share.query)} query, {len(share.kv)} KV heads)")
        shape = ", ".join(map(str, kind.shapes[index]))
        held = f" stores [{shape}]: {kind.ranges(index) or 'nothing'}{''.join(notes)}"
        lines.append(Text.assemble("  ", (f"{rank}", _style(rank)), held))
    if len(lines) > MOST:
        more = len(lines) - MOST
        lines = [*lines[: MOST - 1], Text(f"  … and {more} more"), lines[-1]]
    return lines


def _beside(kind: Kind) -> Text:
    """A line about a scale: what it is, and whose."""
    from rich.text import Text

    shapes = " + ".join(str(list(source.shape)) for source in kind.sources)
    each = f" x {kind.count}" if kind.experts else ""
    return Text(f"  with {_tensor(kind, f' {shapes}{each}')}; {', '.join(where(kind))}")


def _tensor(kind: Kind, shapes: str = "") -> str:
    """``w13_weight_scale_inv F32 [12, 16] + [12, 16] x 128, one for a block of 128 x 128``."""
    holds = f", {entry(kind.holds)}" if kind.holds else ""
    return f"{printable(kind.short.rpartition('.')[2])} {kind.dtype}{shapes}{holds}"


def _style(rank: int) -> str:
    return f"black on {COLOURS[rank % len(COLOURS)]}"
