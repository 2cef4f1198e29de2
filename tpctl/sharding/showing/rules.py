"""What each split rule does, in words."""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.partition.split import Rule


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
    Rule.VOCAB: RuleText(
        "rows of the vocabulary divided",
        "Divided by tokens of the vocabulary, which is padded with zero rows to a multiple of 64. As the embedding, a "
        "rank looks up the tokens it has and the results are summed; as the output head, it scores its own tokens.",
    ),
}
