"""The figures of the page: a weight whole, and the same weight in the pieces that the ranks store, to one scale."""

from __future__ import annotations

from collections.abc import Sequence

from tpctl.partition.split import Rule
from tpctl.sharding.showing.bands import Band
from tpctl.sharding.showing.kinds import Kind, SourcePicture
from tpctl.sharding.showing.svg import Svg

LABEL = 34.0
"""Room for "gate" left of a source."""

CARD = 7.0
"""How far a copy shows behind the one before it."""

MOST_RANKS = 16
"""Ranks whose stored tensors a figure shows; the whole weight beside them shows all."""


def figure(kind: Kind) -> str:
    """The whole weight on the left, what each rank stores of it on the right, both to one scale. Of experts: how they
    are dealt, and one of them."""
    svg = Svg()
    if kind.dealt:
        _experts(svg, kind)
    elif kind.rule in (Rule.REPLICATED, Rule.EXPERTS):
        _vector(svg, kind)
    else:
        _matrix(svg, kind, 0)
    return svg.render(f"how {kind.title} is cut")


def _vector(svg: Svg, kind: Kind) -> None:
    """A weight that every rank holds whole."""
    shown, width = kind.ranks[:8], 120.0
    left = width + 56
    shape = " × ".join(f"{size:,}" for size in kind.inner[0])
    each = f"{kind.count} of these: " if kind.experts else ""
    what = f"one vector of {shape} numbers" if len(kind.inner[0]) == 1 else f"one matrix, {shape}"
    svg.text(0, 12, each + what, "note")
    svg.rect(0, 20, width, 16, "whole")
    svg.line(width + 14, 28, width + 44, 28)
    for index, rank in enumerate(shown):
        svg.rect(left, 20 + index * 20, width, 16, "cell", rank, f"rank {rank} holds all of it")
        svg.text(left + width + 8, 32 + index * 20, f"rank {rank}: all of it")
    if len(kind.ranks) > len(shown):
        svg.text(left + width + 8, 32 + len(shown) * 20, f"… and {len(kind.ranks) - len(shown)} more", "note")


BAR = 84.0
"""The width of the bar of experts."""


def _experts(svg: Svg, kind: Kind) -> None:
    """The experts in a bar, by the ranks that have them; beside it one of them as its ranks divide it, or what each
    rank has."""
    height = max(150.0, 15.0 * len(kind.experts), 18.0 * min(len(kind.ranks), MOST_RANKS) if not kind.cut else 0.0)
    top, scale = 34.0, height / kind.count
    shape = " × ".join(f"{size:,}" for size in _whole(kind))
    svg.text(0, 12, f"{kind.count} experts,", "note")
    svg.text(0, 26, f"each {shape}", "note")
    for band in kind.experts:
        place = (0.0, top + band.start * scale, BAR, len(band) * scale)
        _band(svg, band, place, "experts", "experts", (CARD, 0))
    left = BAR + CARD * max(len(band.ranks) for band in kind.experts) + 60
    middle = top + min(height, 150.0) / 2
    svg.line(left - 46, middle, left - 16, middle)
    if kind.cut:
        _matrix(svg, kind, left, f"one of experts {kind.experts[0].start} to {kind.experts[0].stop - 1}:")
        return
    svg.text(left, 26, "what each rank stores", "note")
    for index, rank in enumerate(kind.ranks[:MOST_RANKS]):
        first, stop = kind.held[index]
        y, size = top + index * height / min(len(kind.ranks), MOST_RANKS), (stop - first) * scale
        size = min(size, height / min(len(kind.ranks), MOST_RANKS) - 3)
        svg.rect(left, y, BAR, size, "cell", rank, f"rank {rank}: experts {first} to {stop - 1}")
        svg.text(left + BAR + 8, y + size / 2 + 4, f"rank {rank} · experts {first}:{stop}, each whole")
    _more(svg, kind, left, top + height + 12)


def _whole(kind: Kind) -> tuple[int, ...]:
    """The shape of one expert's tensor, of all ranks."""
    shape = list(kind.sources[0].shape)
    shape[kind.dim] = sum(source.shape[kind.dim] for source in kind.sources)
    return tuple(shape)


def _matrix(svg: Svg, kind: Kind, start: float, whose: str = "whole:") -> None:
    whole = _whole(kind)
    rows, across = whole[0], whole[1] if len(whole) > 1 else 1
    width, height = _box(across, rows, kind)
    sx, sy = width / across, height / rows
    several = len(kind.sources) > 1
    top = 44.0 if kind.experts else 34.0
    captions = _captions(kind, whose, whole)
    for line, caption in enumerate(captions):
        svg.text(start, 12 + 14 * line, caption, "note")
    under = top + height + 14 + CARD * (kind.copies - 1)
    labelled = kind.dim == 0 and kind.sources[0].label
    x, y = start + (LABEL if labelled else 0), top
    if kind.experts:
        _pile(svg, x, y, width, height, kind)
    for source in kind.sources:
        if kind.dim == 0:
            y = _source(svg, source, kind.dim, x, y, sx, sy, across) + (5 if several else 0)
            if labelled:
                svg.text(start, y - source.shape[0] * sy / 2 - (1 if several else -4), source.label, "label")
        else:
            _source(svg, source, kind.dim, x, y, sx, sy, across)
            if several and source.label:
                svg.text(x + source.shape[1] * sx / 2, under, source.label, "label", "middle")
            x += source.shape[1] * sx + (5 if several else 0)
    width += (LABEL if labelled else 0) + CARD * (kind.copies - 1) + (12 if kind.experts else 0)
    long = max(map(len, captions)) if kind.experts or kind.beside else 0
    width = start + max(width, 150.0, 6.2 * long - 40)  # room for the captions above
    middle = top + min(height, 300.0) / 2
    svg.line(width + 16, middle, width + 46, middle)
    if kind.dim == 0:
        _stacked(svg, kind, width + 60, top, sx, sy, across)
    else:
        _side_by_side(svg, kind, width + 60, top, sx, sy)


def _pile(svg: Svg, x: float, y: float, width: float, height: float, kind: Kind) -> None:
    """Edges of more experts behind the one that is drawn."""
    gaps = 5 * (len(kind.sources) - 1)
    width, height = (width, height + gaps) if kind.dim == 0 else (width + gaps, height)
    for step in (8, 4):
        svg.rect(x + step, y - step, width, height, "whole")


def _captions(kind: Kind, whose: str, whole: Sequence[int]) -> tuple[str, str]:
    """What rows and columns are, above a weight."""
    if kind.rule == Rule.COLUMN and not kind.axes:  # no linear's
        each = " × ".join(f"{size:,}" for size in whole[1:])
        return f"{whose} {whole[0]:,} entries", f"of {each} numbers each" if each else ""
    axes = kind.axes if len(kind.axes) > 1 else ("outputs", "inputs")
    times = f" × {kind.count} experts" if kind.experts and not kind.dealt else ""
    columns = whole[1] if len(whole) > 1 else 1
    return f"{whose} {whole[0]:,} rows ({axes[0]})", f"× {columns:,} columns ({axes[1]}){times}"


def _box(across: int, rows: int, kind: Kind) -> tuple[float, float]:
    """Size in pixels: in proportion, but neither a needle nor a wall, and with room for every rank's band."""
    ratio = max(0.3, min(3.0, across / rows))
    size = 150.0 if kind.dealt else 240.0  # there the experts are beside it
    width = size if ratio >= 1 else size * ratio
    height = size / ratio if ratio >= 1 else size
    bands = len(kind.ranks)
    if kind.dim:
        return max(width, 14.0 * bands * len(kind.sources)), height
    narrowest = min(len(band) for source in kind.sources for band in source.bands)
    return width, max(height, min(14.0 * rows / narrowest, 14.0 * bands * len(kind.sources)))


def _source(
    svg: Svg, source: SourcePicture, dim: int, left: float, top: float, sx: float, sy: float, across: int
) -> float:
    """A source tensor with its bands; returns where it ends."""
    first = source.bands[0].start
    for band in source.bands:
        start, size = band.start - first, band.stop - band.start
        if dim == 0:
            place = (left, top + start * sy, across * sx, size * sy)
        else:
            place = (left + start * sx, top, size * sx, source.shape[0] * sy)
        step = (CARD, 0.0) if dim == 0 else (0.0, CARD)
        _band(svg, band, place, source.label or source.name, "rows" if dim == 0 else "columns", step)
    return top + source.shape[0] * sy


def _band(
    svg: Svg,
    band: Band,
    place: tuple[float, float, float, float],
    name: str,
    what: str,
    step: tuple[float, float],
) -> None:
    """One band of ``what``; copies of it that several ranks hold lie behind each other like cards, a ``step`` apart."""
    x, y, w, h = place
    if not band.ranks:
        svg.rect(x, y, w, h, "absent", None, f"{what} {band.start} to {band.stop - 1}: not in this folder")
        return
    copies = "" if len(band.ranks) == 1 else f", which has a copy, as {len(band.ranks) - 1} more"
    for index, rank in reversed(list(enumerate(band.ranks))):
        tip = f"{name}: {what} {band.start} to {band.stop - 1}, rank {rank}{copies}"
        svg.rect(x + index * step[0], y + index * step[1], w, h, "cell", rank, tip)
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
    x, bottom = left, top + kind.inner[0][0] * sy
    several = len(kind.sources) > 1
    for index in range(min(len(kind.ranks), MOST_RANKS)):
        rank = kind.ranks[index]
        for label, start, stop in kind.pieces[index]:
            width = (stop - start) * sx
            tip = (
                f"rank {rank}: {label} columns {start} to {stop - 1}"
                if several
                else (f"rank {rank}: columns {start} to {stop - 1}")
            )
            svg.rect(x, top, width, bottom - top, "cell", rank, tip)
            if width >= 10:
                svg.text(x + width / 2, top + (bottom - top) / 2 + 4, str(rank), "in", "middle")
            x += width
        x += 6
    y = bottom + 18
    for index in range(min(len(kind.ranks), MOST_RANKS)):
        svg.text(left, y, _caption(kind, index))
        y += 16
    _more(svg, kind, left, y)


def _caption(kind: Kind, index: int) -> str:
    shape = " × ".join(f"{size:,}" for size in kind.shapes[index])
    axis = "" if kind.dealt else f"{kind.axis} "
    return f"rank {kind.ranks[index]} · {shape} · {axis}{kind.ranges(index)}"


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
