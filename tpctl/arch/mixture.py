"""Mixtures of experts under the names that checkpoints have for them; stored as engines hold them, stacked.

    mlp.experts.w13_weight [E, 2I, H]    gate and up of every expert, below each other
    mlp.experts.w2_weight  [E, H, I]     down

A checkpoint has a tensor for each expert and projection, or one stack for gate and up and one for down.
"""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch.block import Activation, Experts, Gated
from tpctl.arch.linear import Linear, Vector
from tpctl.arch.storage import FUSED
from tpctl.partition.cuts import Even, Whole
from tpctl.partition.split import EACH, Part, Rule, Stack

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def experts(
    hidden: int,
    width: int,
    count: int,
    per_token: int,
    *,
    where: str = "mlp",
    projections: tuple[str, str, str] = PROJECTIONS,
    router: str = "gate",
    router_bias: bool = False,
    correction: str | None = None,
    shared: Gated | None = None,
    shared_gate: str | None = None,
) -> Experts:
    """A mixture of ``count`` experts of inner size ``width``.

    Args:
        where: the module they are in.
        projections: names of gate, up and down, of an expert.
        router: name of the linear that scores the experts.
        correction: of the numbers that are added to the scores for the choice alone.
        shared_gate: of the linear of one output that weighs the shared MLP.
    """
    gate, up, down = (f"{where}.experts.{EACH}.{name}" for name in projections)
    stack = Stack(count, Whole())
    each = (
        Linear(
            f"{where}.experts.w13",
            Rule.MERGED_COLUMN,
            (Part(gate, width, Even(), label="gate"), Part(up, width, Even(), label="up")),
            hidden,
            stack=stack,
            joiner="_",
        ),
        Linear(f"{where}.experts.w2", Rule.ROW, (Part(down, hidden, Whole()),), width, Even(), stack=stack, joiner="_"),
    )
    fused = f"{where}.experts.gate_up_proj"
    stacked = (
        replace(
            each[0],
            parts=(Part(fused, width, Even(), label="gate"), Part(fused, width, Even(), offset=width, label="up")),
            storage=FUSED,
        ),
        replace(each[1], parts=(Part(f"{where}.experts.down_proj", hidden, Whole()),), storage=FUSED),
    )
    return Experts(
        count,
        per_token,
        *each,
        router=(*scores(f"{where}.{router}", hidden, count, router_bias), *_vector(correction, count)),
        shared=shared,
        shared_gate=None if shared_gate is None else whole(shared_gate, hidden, 1),
        forms=(stacked,),
    )


def scores(name: str, hidden: int, count: int, bias: bool = False) -> tuple[Linear]:
    """The linear that scores ``count`` experts, whole on every rank."""
    return (whole(name, hidden, count, bias),)


def whole(name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
    """A linear that every rank has whole."""
    return Linear(name, Rule.REPLICATED, (Part(name, outputs, Whole()),), inputs, bias=bias)


def gated_mlp(where: str, hidden: int, width: int, activation: Activation = "silu") -> Gated:
    """A gated MLP in module ``where`` (a shared expert), of inner size ``width``."""
    gate, up, down = (f"{where}.{name}" for name in PROJECTIONS)
    return Gated(
        Linear(
            f"{where}.gate_up_proj",
            Rule.MERGED_COLUMN,
            (Part(gate, width, Even(), label="gate"), Part(up, width, Even(), label="up")),
            hidden,
        ),
        Linear(f"{where}.down_proj", Rule.ROW, (Part(down, hidden, Whole()),), width, Even()),
        activation,
    )


def _vector(name: str | None, count: int) -> tuple[Vector, ...]:
    return () if name is None else (Vector(name, count),)
