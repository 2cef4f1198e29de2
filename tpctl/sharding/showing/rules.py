"""What each split rule does, in words."""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.partition.split import Rule
from tpctl.sharding.showing.kinds import Kind


@dataclass(frozen=True)
class RuleText:
    """``line`` stands under a picture, ``paragraph`` on the page."""

    line: str
    paragraph: str


RULE_TEXTS = {
    Rule.REPLICATED: RuleText(
        "whole on every rank",
        "Small and needed whole by everyone, so every rank has a copy.",
    ),
    Rule.COLUMN: RuleText(
        "column-parallel: output rows divided",
        "Column-parallel: each rank has the whole input and computes its own outputs.",
    ),
    Rule.MERGED_COLUMN: RuleText(
        "column-parallel: output rows divided, gate and up alike",
        "Column-parallel. Gate and up are cut at the same places and stored as one matrix, so that one product gives "
        "both, and a rank can multiply SiLU(gate) with up entry by entry on its own.",
    ),
    Rule.QKV: RuleText(
        "column-parallel: output rows divided in whole heads",
        "Column-parallel, in whole attention heads. Each rank stores its query heads, then the key and the value heads "
        "that they read, as one matrix. A head is never divided.",
    ),
    Rule.ROW: RuleText(
        "row-parallel: input columns divided, results summed",
        "Row-parallel: each rank takes the inputs that it computed itself and gets a part of every output. The "
        "all-reduce that follows adds the parts.",
    ),
    Rule.EXPERTS: RuleText(
        "whole on the ranks that have the expert",
        "Of an expert each, and on the ranks that have a part of it.",
    ),
    Rule.VOCAB: RuleText(
        "rows of the vocabulary divided",
        "Divided by tokens of the vocabulary, which is padded with zero rows to a multiple of 64. As the embedding, a "
        "rank looks up the tokens it has and the results are summed; as the output head, it scores its own tokens.",
    ),
}


VECTORS = RuleText(
    "divided by heads or channels",
    "Numbers for each head or channel, divided as those are.",
)
"""Of what a column-parallel rule divides and is no linear's."""


def _text(kind: Kind) -> RuleText:
    if kind.rule == Rule.COLUMN and not kind.axes:
        return VECTORS
    text = RULE_TEXTS[Rule(kind.rule)]
    if not kind.turned:
        return text
    words = text.line.replace("output rows", "outputs").replace("input columns", "inputs")
    return RuleText(f"{words} (outputs lie across here)", f"{text.paragraph} It is stored [inputs × outputs].")


def line(kind: Kind) -> str:
    """What is done with ``kind``, for below its picture."""
    own = _text(kind).line
    if not kind.experts:
        return own
    if not kind.dealt:
        return f"{kind.count} experts, all cut alike; {own}"
    if not kind.cut:
        return f"{kind.count} experts, dealt to the ranks, each of them whole"
    return f"{kind.count} experts, dealt to {len(kind.experts)} groups of ranks, and in each group cut alike; {own}"


def paragraph(kind: Kind) -> str:
    """The same, for the page."""
    own = _text(kind).paragraph
    if not kind.experts:
        return own
    if not kind.dealt:
        return f"{own} So for each of the {kind.count} experts alike: the figure shows one of them."
    dealt = f"Of {kind.count} experts each rank has some: whole experts are dealt to "
    if not kind.cut:
        return f"{dealt}the ranks, and no expert is cut. A rank works on the tokens that chose one of its own."
    return (
        f"{dealt}{len(kind.experts)} groups of ranks, and the ranks of a group divide theirs. {own} The figure shows "
        "one expert of the first group; those of the others are cut alike."
    )


def entry(holds: str) -> str:
    """What an entry of a tensor of quantised weights stands for (``TensorReport.holds``)."""
    return f"an entry holds {holds}" if holds.partition(" ")[2].startswith("packed") else f"one for {holds}"


def where(kind: Kind) -> list[str]:
    """Which ranks have a scale, and how much of it is copied, in a few words each."""
    if not kind.cut:
        return ["with its expert" if kind.dealt else "whole on every rank"]
    shared, total = kind.shared
    found = ["cut with the weight"]
    if shared:
        ranks = f"{kind.copies} ranks" if kind.copies == 2 else f"up to {kind.copies} ranks"
        found.append(f"{shared} of {total} {kind.axis} copied: on {ranks}")
    return found
