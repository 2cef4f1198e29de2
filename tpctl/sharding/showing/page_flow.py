"""The page's two figures of computing: a product small enough to follow, and the way through one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from tpctl.arch.block import Experts, Gated, Layer, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.errors import shorten
from tpctl.manifest.manifest import rank_list
from tpctl.sharding.showing.kinds import Kind
from tpctl.sharding.showing.page_svg import cells
from tpctl.sharding.showing.steps import Bar, Lanes, Step, kinds_in, steps
from tpctl.sharding.showing.svg import Svg

LANES = 4
"""Ranks that the way through a block shows side by side."""


def column_example() -> str:
    """W x with the rows of W divided: each rank has some of the result."""
    svg = Svg()
    x = cells(svg, 0, 14, [["1", "2"], ["3", "4"]], [[0, 0], [1, 1]])
    svg.text(x + 4, 44, "×", "op")
    x = cells(svg, x + 20, 14, [["5"], ["6"]], [[None], [None]])
    svg.text(x + 4, 44, "=", "op")
    x = cells(svg, x + 22, 14, [["17"], ["39"]], [[0], [1]])
    svg.text(x + 10, 31, "rank 0:  1·5 + 2·6 = 17", rank=0)
    svg.text(x + 10, 57, "rank 1:  3·5 + 4·6 = 39", rank=1)
    return svg.render("a product with the rows of the matrix divided between two ranks")


def row_example() -> str:
    """W x with the columns of W divided: each rank has a part of every entry, and the parts are added."""
    svg = Svg()
    x = cells(svg, 0, 14, [["1", "2"], ["3", "4"]], [[0, 1], [0, 1]])
    svg.text(x + 4, 44, "×", "op")
    x = cells(svg, x + 20, 14, [["5"], ["6"]], [[0], [1]])
    svg.text(x + 4, 44, "=", "op")
    x = cells(svg, x + 22, 14, [["5"], ["15"]], [[0], [0]])
    svg.text(x + 4, 44, "+", "op")
    x = cells(svg, x + 20, 14, [["12"], ["24"]], [[1], [1]])
    svg.text(x + 4, 44, "=", "op")
    cells(svg, x + 22, 14, [["17"], ["39"]], [[None], [None]])
    return svg.render("the same product with the columns of the matrix divided between two ranks")


@dataclass(frozen=True)
class Flow:
    """The figures of the layers, and words for the text above them: how many blocks are ``alike``, the two ``parts``
    that each has, and which bars of a figure are ``reduces``."""

    figures: str
    alike: str
    parts: str
    reduces: str


def block_flow(blueprint: Blueprint, found: Sequence[Kind], tp_size: int) -> Flow:
    """The way of a hidden state through a decoder block, once for each sort of blocks: a lane a rank, a bar where all
    ranks hold the same."""
    sorts: dict[tuple[Step, ...], list[int]] = {}
    alike: dict[int, tuple[Step, ...]] = {}
    for number, layer in enumerate(blueprint.layers):
        known = next((first for first in alike if blueprint.layers[first] == layer), number)
        if known == number:
            alike[number] = steps(blueprint, number, kinds_in(blueprint, number, found), tp_size)
        sorts.setdefault(alike[known], []).append(number)
    ranks = next(iter(found)).ranks
    figures = []
    for way, numbers in sorts.items():
        if len(sorts) > 1:
            figures.append(_heading(blueprint, numbers))
        figures.append(f'<div class="scroll">{_draw(way, ranks)}</div>')
    sums = {sum(isinstance(step, Bar) and step.style == "reduce" for step in way) for way in sorts}
    experts = [any(True for _ in experts_in(layer)) for layer in blueprint.layers]
    mixed = any(isinstance(layer.mixer, Mixer) for layer in blueprint.layers)
    mlp = "a part of experts" if all(experts) else "an MLP part or one of experts" if any(experts) else "an MLP part"
    return Flow(
        "".join(figures),
        "like this one" if len(sorts) == 1 else f"of {_number(len(sorts))} sorts",
        f"{'a part that mixes tokens' if mixed else 'an attention part'} and {mlp}",
        "dark bars" if len(sums) > 1 else "bar" if sums == {1} else f"{_number(sums.pop())} bars",
    )


def _heading(blueprint: Blueprint, numbers: Sequence[int]) -> str:
    """Of a figure that is of some blocks only."""
    several = len(numbers) > 1
    title = f"{'Layers' if several else 'Layer'} {shorten(rank_list(numbers).replace(',', ', '), 60)}"
    of = f"{len(numbers)} of {len(blueprint.layers)} blocks: " if several else ""
    what = f"{of}{called(blueprint.layers[numbers[0]])}"
    return f"<h3 class='sort'>{escape(title)}</h3><p class='aside'>{escape(what)}</p>"


def experts_in(layer: Layer) -> Iterator[Experts]:
    return (part for part in layer.parts if isinstance(part, Experts))


def called(layer: Layer) -> str:
    """What a layer is made of, in a few words."""
    mixer = layer.mixer
    if isinstance(mixer, Mixer):
        words = mixer.kind
    else:
        words = "attention over all tokens" if mixer.window is None else f"attention over a window of {mixer.window:,}"
        words += " with an output gate" if mixer.gate else ""
        words += "" if mixer.reads is None else f", of the keys of layer {mixer.reads}"
    parts = [
        f"{part.count} experts" + (" and a shared one" if part.shared is not None else "")
        if isinstance(part, Experts)
        else "an MLP"
        for part in layer.parts
        if isinstance(part, Gated | Experts)
    ]
    return ", ".join([words, *parts])


def _number(count: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six")
    return words[count] if count < len(words) else str(count)


def _draw(way: Sequence[Step], ranks: Sequence[int]) -> str:
    shown = min(len(ranks), LANES)
    lane = max(150.0, 432.0 / shown)  # up to two ranks fit a telephone's width
    width, svg, y = lane * shown - 12, Svg(), 24.0
    for place in range(shown):
        svg.text(place * lane + (lane - 12) / 2, 14, f"rank {ranks[place]}", "in", "middle", ranks[place])
    for step in way:
        height = 40.0 if isinstance(step, Lanes) or step.detail else 28.0
        if isinstance(step, Bar):
            svg.rect(0, y, width, height, step.style)
            svg.text(width / 2, y + (17 if step.detail else 18), step.title, "in", "middle")
            if step.detail:
                svg.text(width / 2, y + 32, step.detail, "in small", "middle")
        else:
            for place in range(shown):
                x, rank, (title, detail) = place * lane, ranks[place], step.cells[place]
                svg.rect(x, y, lane - 12, 40, f"cell {step.style}", rank, f"rank {rank}: {title}, {detail}")
                svg.text(x + (lane - 12) / 2, y + 17, title, "in", "middle")
                svg.text(x + (lane - 12) / 2, y + 32, detail, "in small", "middle")
            if step.note:
                svg.text(width + 16, y + 24, step.note, "note")
        y += height
        if step is not way[-1]:
            for place in range(shown):
                x = place * lane + (lane - 12) / 2
                svg.line(x, y + 1, x, y + 13)
            y += 17
    if len(ranks) > shown:
        more = len(ranks) - shown
        svg.text(0, y + 14, f"{more} more {'rank does' if more == 1 else 'ranks do'} the same beside these", "note")
    reduces = _number(sum(isinstance(step, Bar) and step.style == "reduce" for step in way))
    return svg.render(f"the way through one decoder block with its {reduces} all-reduces")
