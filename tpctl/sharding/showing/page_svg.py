"""The figures of the page: a weight whole, and the same weight in the pieces that the ranks store, to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from tpctl.sharding.showing.kinds import Band, Kind, SourcePicture

LABEL = 34.0
"""Room for "gate" left of a source."""

CARD = 7.0
"""How far a copy shows behind the one before it."""

MOST_RANKS = 16
"""Ranks whose stored tensors a figure shows; the whole weight beside them shows all."""


def hue(rank: int) -> int:
    """A rank's colour: the golden angle keeps neighbours apart."""
    return round(205 + rank * 137.5) % 360


@dataclass
class Svg:
    """SVG elements, and how far they reach."""

    items: list[str] = field(default_factory=list)
    width: float = 0
    height: float = 0

    def rect(self, x: float, y: float, w: float, h: float, kind: str, rank: int | None = None, tip: str = "") -> None:
        self._reach(x + w, y + h)
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self.items.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" class="{kind}"{_rank(rank)}>{title}</rect>'
        )

    def text(
        self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", rank: int | None = None
    ) -> None:
        self._reach(x + (len(text) * 7 if anchor == "start" else 0), y + 4)
        name = f' class="{kind}"' if kind else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.items.append(f'<text x="{x:.1f}" y="{y:.1f}"{name}{place}{_rank(rank)}>{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "arrow") -> None:
        self._reach(max(x1, x2), max(y1, y2))
        self.items.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def render(self, label: str) -> str:
        width, height = self.width + 4, self.height + 4
        return (
            f'<svg role="img" aria-label="{escape(label)}" viewBox="-2 -2 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}">{"".join(self.items)}</svg>'
        )

    def _reach(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)


def _rank(rank: int | None) -> str:
    return "" if rank is None else f' data-r="{rank}" style="--h:{hue(rank)}"'


def figure(kind: Kind) -> str:
    """The whole weight on the left, what each rank stores of it on the right, both to one scale."""
    svg = Svg()
    if kind.rule == "replicated":
        _vector(svg, kind)
    elif len(kind.shapes[0]) == 1:
        _bias(svg, kind)
    else:
        _matrix(svg, kind)
    return svg.render(f"how {kind.title} is cut")


def _vector(svg: Svg, kind: Kind) -> None:
    """A weight that every rank holds whole."""
    shown, width = kind.ranks[:8], 120.0
    left = width + 56
    svg.text(0, 12, f"one vector of {kind.shapes[0][0]:,} numbers", "note")
    svg.rect(0, 20, width, 16, "whole")
    svg.line(width + 14, 28, width + 44, 28)
    for index, rank in enumerate(shown):
        svg.rect(left, 20 + index * 20, width, 16, "cell", rank, f"rank {rank} holds all of it")
        svg.text(left + width + 8, 32 + index * 20, f"rank {rank}: all of it")
    if len(kind.ranks) > len(shown):
        svg.text(left + width + 8, 32 + len(shown) * 20, f"… and {len(kind.ranks) - len(shown)} more", "note")


def _bias(svg: Svg, kind: Kind) -> None:
    """A vector that is divided: as a matrix of one column."""
    _matrix(svg, kind, columns=1)


def _matrix(svg: Svg, kind: Kind, columns: int | None = None) -> None:
    rows = sum(s.shape[0] for s in kind.sources) if kind.dim == 0 else kind.sources[0].shape[0]
    across = columns or (kind.sources[0].shape[1])
    width, height = _box(across, rows, kind)
    sx, sy = width / across, height / rows
    top = 34.0
    rows_are, columns_are = ("tokens", "features") if kind.rule == "vocab" else ("outputs", "inputs")
    svg.text(0, 12, f"whole: {rows:,} rows ({rows_are})", "note")
    svg.text(0, 26, f"× {across:,} columns ({columns_are})", "note")
    y, left = top, LABEL if kind.sources[0].label else 0
    for source in kind.sources:
        y = _source(svg, source, kind.dim, left, y, sx, sy, across) + (5 if len(kind.sources) > 1 else 0)
    width += left + CARD * (kind.copies - 1)
    width = max(width, 150.0)  # room for the caption above
    middle = top + min(height, 300.0) / 2
    svg.line(width + 16, middle, width + 46, middle)
    if kind.dim == 0:
        _stacked(svg, kind, width + 60, top, sx, sy, across)
    else:
        _side_by_side(svg, kind, width + 60, top, sx, sy)


def _box(across: int, rows: int, kind: Kind) -> tuple[float, float]:
    """Size in pixels: in proportion, but neither a needle nor a wall, and with room for every rank's band."""
    ratio = max(0.3, min(3.0, across / rows))
    width = 240.0 if ratio >= 1 else 240.0 * ratio
    height = 240.0 / ratio if ratio >= 1 else 240.0
    bands = len(kind.ranks)
    if kind.dim:
        return max(width, 14.0 * bands), height
    narrowest = min(band.stop - band.start for source in kind.sources for band in source.bands)
    return width, max(height, min(14.0 * rows / narrowest, 14.0 * bands * len(kind.sources)))


def _source(
    svg: Svg, source: SourcePicture, dim: int, left: float, top: float, sx: float, sy: float, across: int
) -> float:
    """A source tensor with its bands, its label left of it; returns where it ends."""
    first = source.bands[0].start
    for band in source.bands:
        start, size = band.start - first, band.stop - band.start
        if dim == 0:
            place = (left, top + start * sy, across * sx, size * sy)
        else:
            place = (left + start * sx, top, size * sx, source.shape[0] * sy)
        _band(svg, band, place, source, dim)
    height = source.shape[0] * sy
    if source.label:
        svg.text(0, top + height / 2 + 4, source.label, "label")
    return top + height


def _band(svg: Svg, band: Band, place: tuple[float, float, float, float], source: SourcePicture, dim: int) -> None:
    """One band; copies of it that several ranks hold lie behind each other like cards."""
    x, y, w, h = place
    what = "rows" if dim == 0 else "columns"
    if not band.ranks:
        svg.rect(x, y, w, h, "absent", None, f"{what} {band.start} to {band.stop - 1}: not in this folder")
        return
    copies = "" if len(band.ranks) == 1 else f", which has a copy, as {len(band.ranks) - 1} more"
    for index, rank in reversed(list(enumerate(band.ranks))):
        tip = f"{source.label or source.name}: {what} {band.start} to {band.stop - 1}, rank {rank}{copies}"
        svg.rect(x + index * CARD, y, w, h, "cell", rank, tip)
    names = str(band.ranks[0]) if len(band.ranks) == 1 else f"{band.ranks[0]} to {band.ranks[-1]}"
    if len(band.ranks) == 2:
        names = f"{band.ranks[0]} and {band.ranks[1]}"
    if h >= 11 and w >= 7 * len(names):
        svg.text(x + w / 2, y + h / 2 + 4, names, "in", "middle", band.ranks[0] if len(band.ranks) == 1 else None)


def _stacked(svg: Svg, kind: Kind, left: float, top: float, sx: float, sy: float, across: int) -> None:
    """Column-parallel: each rank's rows, one rank below the other."""
    svg.text(left, 26, "what each rank stores", "note")
    y = top
    for index in range(min(len(kind.ranks), MOST_RANKS)):
        rank, begin = kind.ranks[index], y
        for label, start, stop in kind.pieces[index]:
            height = max(2.0, (stop - start) * sy)
            svg.rect(left, y, across * sx, height, "cell", rank, f"rank {rank}: {label} rows {start} to {stop - 1}")
            if label and height >= 12:
                svg.text(left + 4, y + height / 2 + 4, label, "label")
            y += height
        if padded := kind.padded_rows(index):
            height = max(3.0, padded * sy)
            svg.rect(left, y, across * sx, height, "padding", None, f"{padded} rows of zeros, so that sizes are even")
            y += height
        y = max(y, begin + 12)
        svg.text(left + across * sx + 8, (begin + y) / 2 + 4, _caption(kind, index))
        y += 6
    _more(svg, kind, left, y + 10)


def _side_by_side(svg: Svg, kind: Kind, left: float, top: float, sx: float, sy: float) -> None:
    """Row-parallel: each rank's columns, one rank beside the other."""
    svg.text(left, 26, "what each rank stores", "note")
    x, bottom = left, top + kind.shapes[0][0] * sy
    for index in range(min(len(kind.ranks), MOST_RANKS)):
        rank, width = kind.ranks[index], kind.shapes[index][1] * sx
        for _, start, stop in kind.pieces[index]:
            svg.rect(x, top, width, bottom - top, "cell", rank, f"rank {rank}: columns {start} to {stop - 1}")
        if width >= 10:
            svg.text(x + width / 2, top + (bottom - top) / 2 + 4, str(rank), "in", "middle")
        x += width + 6
    y = bottom + 18
    for index in range(min(len(kind.ranks), MOST_RANKS)):
        svg.text(left, y, _caption(kind, index))
        y += 16
    _more(svg, kind, left, y)


def _caption(kind: Kind, index: int) -> str:
    shape = " × ".join(f"{size:,}" for size in kind.shapes[index])
    axis = "rows" if kind.dim == 0 else "columns"
    return f"rank {kind.ranks[index]} · {shape} · {axis} {kind.ranges(index)}"


def _more(svg: Svg, kind: Kind, x: float, y: float) -> None:
    if len(kind.ranks) > MOST_RANKS:
        svg.text(x, y, f"… and {len(kind.ranks) - MOST_RANKS} more ranks", "note")


def cells(svg: Svg, x: float, y: float, rows: Sequence[Sequence[str]], ranks: Sequence[Sequence[int | None]]) -> float:
    """A small matrix of written numbers, each cell coloured by its rank; returns its right edge."""
    for i, (row, owners) in enumerate(zip(rows, ranks, strict=True)):
        for j, (value, rank) in enumerate(zip(row, owners, strict=True)):
            svg.rect(x + j * 30, y + i * 26, 28, 24, "whole" if rank is None else "cell", rank)
            svg.text(x + j * 30 + 14, y + i * 26 + 17, value, "in", "middle")
    return x + 30 * len(rows[0])
