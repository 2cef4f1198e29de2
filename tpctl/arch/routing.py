"""How a mixture chooses its experts: the kinds of router, as data.

Of a token's logits, one for each expert (the router's linear with its bias, if it has one):

    scores   softmax over all experts | sigmoid | the logits themselves ("softmax of chosen")
    choice   scores + correction, where there is one; with groups, only of experts in the best of them, a group being
             as good as its two best experts together. The best ``per_token`` are chosen; equal ones by number.
    weights  the scores of the chosen, without the correction; of "softmax of chosen", the softmax over their logits
             renormalised: divided by (their sum + epsilon)
             times ``scale``

    qwen3_moe, qwen2_moe    softmax, renormalised or not
    mixtral                 softmax, renormalised
    gpt_oss                 softmax of chosen
    glm4_moe, deepseek_v3   sigmoid, groups, renormalised with epsilon 1e-20 or not, scaled
    minimax_m2              sigmoid, renormalised
    gemma4                  softmax, renormalised, then times a factor of the expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scores = Literal["softmax", "sigmoid", "softmax of chosen"]


@dataclass(frozen=True)
class Routing:
    """One kind of router.

    Attributes:
        groups: how many equal runs the experts are in.
        top_groups: how many of them may be chosen from.
        epsilon: added to the sum that ``renormalise`` divides by.
    """

    scores: Scores
    renormalise: bool = False
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    epsilon: float = 0.0
