"""The page's two figures of computing: a product small enough to follow, and the way through one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tpctl.arch.blueprint import Blueprint
from tpctl.arch.linear import Linear
from tpctl.sharding.showing.kinds import Kind, pattern
from tpctl.sharding.showing.page_svg import Svg, cells

LANES = 4
"""Ranks that the way through a block shows side by side."""

Content = Callable[[int], tuple[str, str]]
"""What a rank's step is: from the rank's index, a title and a detail."""


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


_ACTIVATIONS = {"silu": "SiLU", "gelu_tanh": "GELU"}


def block_flow(blueprint: Blueprint, found: Sequence[Kind]) -> str:
    """The way of a hidden state through the first decoder block: a lane a rank, a bar where all ranks hold the same."""
    return _Flow(blueprint, found).draw()


class _Flow:
    def __init__(self, blueprint: Blueprint, found: Sequence[Kind]) -> None:
        self._blueprint, self._block = blueprint, blueprint.blocks[0]
        self._kinds = {kind.name: kind for kind in found if not kind.layers or kind.layers[0] == 0}
        ranks = self._kind(self._block.attention.qkv).ranks
        self._shown = list(range(len(ranks)))[:LANES]
        self._ranks = ranks
        self._lane = max(150.0, 432.0 / len(self._shown))  # up to two ranks fit a telephone's width
        self._width = self._lane * len(self._shown) - 12
        self._svg, self._y = Svg(), 0.0

    def draw(self) -> str:
        hidden, block = self._blueprint.hidden_size, self._block
        total = f"{hidden:,} partial sums a token, added over the ranks; all get the total"
        for lane, index in enumerate(self._shown):
            rank = self._ranks[index]
            self._svg.text(lane * self._lane + (self._lane - 12) / 2, 14, f"rank {rank}", "in", "middle", rank)
        self._y = 24
        self._bar("bar", "hidden state", f"{hidden:,} numbers a token, the same on every rank")
        self._lanes("step", lambda i: ("RMSNorm", "the whole vector"), "Cheap, so every rank does it.")
        self._lanes("weight", self._weight(block.attention.qkv), "Column-parallel: own heads' q, k, v.")
        self._lanes("step", self._heads, self._attention_note())
        self._lanes("weight", self._weight(block.attention.out, "o"), "Row-parallel: inputs are own heads.")
        self._bar("reduce", "all-reduce 1", total)
        self._added(block.after_attention is not None)
        self._lanes("step", lambda i: ("RMSNorm", "the whole vector"), "")
        self._lanes("weight", self._weight(block.mlp.gate_up), "Column-parallel: own share of the width.")
        self._lanes("step", self._activation, "Entry by entry, no exchange.")
        self._lanes("weight", self._weight(block.mlp.down, "down"), "Row-parallel: inputs are own share.")
        self._bar("reduce", "all-reduce 2", total)
        self._added(block.after_mlp is not None, ", on to the next block")
        if len(self._ranks) > len(self._shown):
            more = len(self._ranks) - len(self._shown)
            ranks = "rank does" if more == 1 else "ranks do"
            self._svg.text(0, self._y + 14, f"{more} more {ranks} the same beside these", "note")
        return self._svg.render("the way through one decoder block with its two all-reduces")

    def _added(self, normed: bool, onwards: str = "") -> None:
        first = "through one more RMSNorm, " if normed else ""
        self._bar("bar", f"{first}added to the hidden state{onwards}", last=bool(onwards))

    def _kind(self, linear: Linear) -> Kind:
        return self._kinds[pattern(f"{self._blueprint.prefix.format(0)}{linear.name}.weight")]

    def _bar(self, kind: str, title: str, detail: str = "", last: bool = False) -> None:
        height = 40 if detail else 28
        self._svg.rect(0, self._y, self._width, height, kind)
        self._svg.text(self._width / 2, self._y + (17 if detail else 18), title, "in", "middle")
        if detail:
            self._svg.text(self._width / 2, self._y + 32, detail, "in small", "middle")
        self._y += height
        if not last:
            self._arrows()

    def _lanes(self, kind: str, content: Content, note: str) -> None:
        for lane, index in enumerate(self._shown):
            x, (title, detail) = lane * self._lane, content(index)
            rank = self._ranks[index]
            self._svg.rect(x, self._y, self._lane - 12, 40, f"cell {kind}", rank, f"rank {rank}: {title}, {detail}")
            self._svg.text(x + (self._lane - 12) / 2, self._y + 17, title, "in", "middle")
            self._svg.text(x + (self._lane - 12) / 2, self._y + 32, detail, "in small", "middle")
        if note:
            self._svg.text(self._width + 16, self._y + 24, note, "note")
        self._y += 40
        self._arrows()

    def _arrows(self) -> None:
        for lane in range(len(self._shown)):
            x = lane * self._lane + (self._lane - 12) / 2
            self._svg.line(x, self._y + 1, x, self._y + 13)
        self._y += 17

    def _weight(self, linear: Linear, short: str = "") -> Content:
        kind = self._kind(linear)
        short = short or linear.name.rpartition(".")[2].removesuffix("_proj").replace("_", ", ")
        return lambda i: (f"{short} weight", " × ".join(f"{size:,}" for size in kind.shapes[i]))

    def _heads(self, index: int) -> tuple[str, str]:
        query, kv = self._head_counts(index)
        return "attention", f"{query} query, {kv} KV head{'s' if kv > 1 else ''}"

    def _attention_note(self) -> str:
        if self._kind(self._block.attention.qkv).copies > 1:
            return "No exchange: who needs a KV head has a copy."
        return "No exchange: a head needs no other."

    def _head_counts(self, index: int) -> tuple[int, int]:
        attention = self._block.attention
        query, kv = ((stop - start) for _, start, stop in self._kind(attention.qkv).pieces[index][:2])
        return query // attention.head_dim, kv // attention.head_dim

    def _activation(self, index: int) -> tuple[str, str]:
        mlp = self._block.mlp
        return f"{_ACTIVATIONS[mlp.activation]}(gate) · up", f"{self._kind(mlp.down).shapes[index][1]:,} numbers"
