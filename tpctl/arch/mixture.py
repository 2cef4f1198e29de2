"""Mixtures of experts under the names that checkpoints have for them; stored as engines hold them, stacked.

    mlp.experts.w13_weight [E, 2I, H]    gate and up of every expert, below each other
    mlp.experts.w2_weight  [E, H, I]     down

A checkpoint has a tensor for each expert and projection, or one stack for gate and up and one for down.
"""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import parts
from tpctl.arch.block import Attention, Experts, Gated, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import MOST_EXPERTS, MOST_LAYERS, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Linear, Vector, below
from tpctl.arch.routing import Routing
from tpctl.arch.storage import FUSED
from tpctl.errors import CheckpointError
from tpctl.partition.cuts import Even, Whole
from tpctl.partition.split import EACH, Part, Rule, Stack

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OWN = frozenset(
    {
        *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"),
        *("num_experts_per_tok", "moe_intermediate_size"),
    }
)
"""Fields that say that a model is a mixture, which others must not have."""

MIXTRAL, SPARSE = ("w1", "w3", "w2"), "block_sparse_moe"
"""Names of the projections of an expert, in Mixtral's checkpoints, and of the module that they are in."""
STACKED = "mlp"
"""The module of experts that a checkpoint stacks, which are named as transformers 5 names them."""


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
    routing: Routing | None = None,
) -> Experts:
    """A mixture of ``count`` experts of inner size ``width``.

    Args:
        where: the module they are in.
        projections: names of gate, up and down, of an expert.
        router: name of the linear that scores the experts.
        correction: name of the numbers that are added to the scores for the choice alone.
        shared_gate: of the linear of one output that weighs the shared MLP.
        routing: how experts are chosen, if tpctl knows it.
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
    rows = below(f"{STACKED}.experts.gate_up_proj", (("gate", width, Even()), ("up", width, Even())))
    stacked = (
        replace(each[0], parts=rows, storage=FUSED),
        replace(each[1], parts=(Part(f"{STACKED}.experts.down_proj", hidden, Whole()),), storage=FUSED),
    )

    def choosing(module: str) -> tuple[Linear | Vector, ...]:
        (gate,) = scores(f"{where}.{router}", hidden, count, router_bias)
        gate = replace(gate, parts=(Part(f"{module}.{router}", count, Whole()),))
        if correction is None:
            return (gate,)
        return gate, Vector(f"{where}.{correction}", count, source=f"{module}.{correction}")

    return Experts(
        count,
        per_token,
        *each,
        router=choosing(where),
        shared=shared,
        shared_gate=None if shared_gate is None else whole(shared_gate, hidden, 1),
        forms=((*stacked, choosing(STACKED)),),
        routing=routing,
    )


def sparse_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have experts, by Qwen's fields: every so many, but for those that are named as dense."""
    step, dense = fields.whole("decoder_sparse_step"), fields.wholes("mlp_only_layers")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def scores(name: str, hidden: int, count: int, bias: bool = False) -> tuple[Linear]:
    """The linear that scores ``count`` experts, whole on every rank."""
    return (whole(name, hidden, count, bias),)


def whole(name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
    """A linear that every rank has whole."""
    return Linear(name, Rule.REPLICATED, (Part(name, outputs, Whole()),), inputs, bias=bias)


def softmax(fields: Fields) -> Routing:
    """Softmax over all experts; ``norm_topk_prob`` says whether the weights of the chosen then add up to 1."""
    return Routing("softmax", renormalise=fields.flag("norm_topk_prob"))


def sigmoid(fields: Fields, count: int, per_token: int) -> Routing:
    """Sigmoids, of experts in the best of ``n_group`` groups, as DeepSeek-V3 and GLM-4.5 have it.

    Raises:
        CheckpointError: the groups are not equal, or have fewer experts than a token takes.
    """
    groups = fields.whole("n_group", most=count)
    top = fields.whole("topk_group", most=groups)
    if count % groups or (groups > 1 and count // groups < 2):
        raise CheckpointError(f"config.json: {count} experts do not form n_group {groups} equal groups of two or more")
    if per_token > count // groups * top:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {per_token}, but topk_group {top} of n_group {groups} have "
            f"{count // groups * top} experts"
        )
    renormalise, most = fields.flag("norm_topk_prob"), 1e6
    scale = fields.number("routed_scaling_factor", least=1 / most, most=most)
    return Routing("sigmoid", renormalise, groups, top, scale, 1e-20 if renormalise else 0.0)


def weighed(fields: Fields, sizes: Sizes, routing: Routing | None = None) -> Experts:
    """The mixture of Qwen's models whose shared expert a gate weighs."""
    count = fields.whole("num_experts", most=MOST_EXPERTS)
    return experts(
        sizes.hidden_size,
        fields.whole("moe_intermediate_size"),
        count,
        fields.whole("num_experts_per_tok", most=count),
        shared=_shared(sizes, "mlp.shared_expert", fields.whole("shared_expert_intermediate_size")),
        shared_gate="mlp.shared_expert_gate",
        routing=routing,
    )


def corrected(fields: Fields, sizes: Sizes) -> Experts:
    """The mixture of DeepSeek's and GLM's models: a correction for the choice, and shared experts as one MLP."""
    width = fields.whole("moe_intermediate_size")
    count = fields.whole(fields.either("n_routed_experts", "num_local_experts"), most=MOST_EXPERTS)
    shared = fields.optional_whole("n_shared_experts", least=0, most=MOST_EXPERTS)
    per_token = fields.whole("num_experts_per_tok", most=count)
    return experts(
        sizes.hidden_size,
        width,
        count,
        per_token,
        correction="gate.e_score_correction_bias",
        shared=_shared(sizes, "mlp.shared_experts", width * shared) if shared else None,
        routing=sigmoid(fields, count, per_token),
    )


def dense_first(fields: Fields, sizes: Sizes, mixer: Attention | Mixer) -> Blueprint:
    """A model of DeepSeek's or GLM's kind: dense layers, then ``corrected`` ones, then those that predict more.

    Of the latter the first is used; its embedding and its head are the model's, of which checkpoints have a second copy
    there (DeepSeek-V3's README_WEIGHTS.md).
    """
    experts, mlp = corrected(fields, sizes), parts.gated(sizes, parts.read_activation(fields))
    first = fields.whole("first_k_dense_replace", least=0)
    mlps = (mlp if layer < first else experts for layer in range(sizes.num_layers))
    layers = tuple(parts.block(sizes, mixer, one) for one in mlps)
    left_out, further = further_layers(fields, sizes.num_layers), None
    if left_out:
        source, names = f"model.layers.{sizes.num_layers}.", ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        further = parts.predictor(sizes, parts.block(sizes, mixer, experts), source, source, names)
    return replace(parts.model(sizes, layers), left_out=left_out, further=further)


def _shared(sizes: Sizes, where: str, width: int) -> Gated:
    return parts.gated(replace(sizes, intermediate_size=width), "silu", where=where)


def further_layers(fields: Fields, num_layers: int) -> tuple[str, ...]:
    """Patterns of the layers behind the last one, which predict more tokens at once."""
    count = fields.whole(fields.either("num_nextn_predict_layers", "num_mtp_layers"), least=0, most=MOST_LAYERS)
    return tuple(rf"model\.layers\.{layer}\..*" for layer in range(num_layers, num_layers + count))
