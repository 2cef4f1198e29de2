"""A mixture of experts: a router chooses a few gated MLPs for every token, which are added up by their weights.

    x ─┬─ router ─ choice of K experts, weights ─┐
       ├─ expert 3: gate_up ─ act·up ─ down ─────┤
       ├─ expert 7: …                           (+)── partial sum of this rank ── all-reduce
       └─ shared MLP [· sigmoid(shared gate)] ───┘

Cut inside of the experts, each rank has a slice of all of them; with expert parallelism groups of ranks have whole
experts, cut within a group. Either way a rank's sum over its own is a partial sum of the output, so that one all-reduce
serves experts and shared MLP together. The router is whole on every rank, and all choose alike. Nothing is dropped:
every token gets its K experts, whatever others chose.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpctl.arch import block
from tpctl.arch.held import HeldLinear, Hold
from tpctl.arch.linear import Linear, Vector
from tpctl.distributed import TPGroup
from tpctl.kernels.common.codes import decode
from tpctl.kernels.experts.routing_reference import route
from tpctl.layers.linear import ReplicatedLinear, emptied
from tpctl.layers.mlp import MLP
from tpctl.layers.module import Layer, attach
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream import Rows
from tpctl.layers.weights.dense import WeightMaker
from tpctl.layers.weights.experts import ExpertWeights, FusedExperts, Gating, MixtureParts, Stack
from tpctl.layers.weights.stored import to_codes


class Gate(ReplicatedLinear):
    """The linear of a router."""

    def use(self, device: WeightMaker) -> None:
        """Nothing: its weights are read as they are, in float32."""

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Normed [T, H] -> float32 [T, E]."""
        assert norm is None
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class SharedGate(ReplicatedLinear):
    """The linear of one output by which the shared MLP counts; of a quantised one kernels read the numbers."""

    def use(self, device: WeightMaker) -> None:
        """Once, after loading."""
        if self.held.is_dense:
            return
        row = torch.cat([decode(codes) for codes in self._codes()]).to(self.dtype or torch.float32)
        for kind in self.held.shapes.keys() - {"bias"}:
            emptied(self, kind)
        self.weight = nn.Parameter(row, requires_grad=False)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Normed [T, H] -> [T, 1]."""
        assert norm is None
        return F.linear(x, self.weight, self.bias)


class Router:
    """Chooses a token's experts, in float32 whatever the model's dtype is: near ties decide a token's way.

    Args:
        layer: the block, under whose names the weights are.
    """

    def __init__(self, made_of: block.Experts, hold: Hold, layer: nn.Module, dtype: torch.dtype | None) -> None:
        assert made_of.routing is not None
        self.routing, self.per_token = made_of.routing, made_of.per_token
        gate = next(one for one in made_of.router if isinstance(one, Linear))
        self.gate = Gate(hold(gate), dtype)
        attach(layer, gate.name, self.gate)
        self._correction: tuple[nn.Module, str] | None = None
        for one in made_of.router:
            if isinstance(one, Vector):
                empty = nn.Parameter(torch.empty(one.size, dtype=torch.float32), requires_grad=False)
                self._correction = attach(layer, one.name, empty)

    @property
    def correction(self) -> Tensor | None:
        """What is added to scores for the choice alone, [E]."""
        return None if self._correction is None else getattr(*self._correction)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> ids int32 [T, K] and weights float32 [T, K]."""
        return route(self.gate(x), self.routing, self.per_token, self.correction)


class Stacks(Layer):
    """The two linears of all experts, whose tensors are parameters under the names that they have in a shard."""

    def __init__(self, made_of: block.Experts, hold: Hold, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._held = hold(made_of.gate_up), hold(made_of.down)
        experts = self._held[0].experts
        assert experts is not None
        self._first = experts.start
        self._gating = Gating(made_of.activation, made_of.interleaved)
        self.weights: ExpertWeights | None = None
        for held in self._held:
            for kind, shape in held.shapes.items():
                name = self._name(held, kind)
                empty = torch.empty(shape, dtype=torch.uint8 if kind in held.kept else dtype)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def use(self, device: ExpertMaker) -> None:
        """Called once, after loading: let the device have them in its own form, which replaces the parameters."""
        gate_up, down = map(self._stack, self._held)
        self.weights = device.experts(gate_up, down, self._gating, self._first)
        for held in self._held:
            for kind in held.shapes:
                emptied(self, self._name(held, kind))

    def _stack(self, held: HeldLinear) -> Stack:
        tensors = {kind: getattr(self, self._name(held, kind)) for kind in held.shapes}
        bias = tensors.get("bias") if held.adds_bias else None
        if not held.is_dense:
            return Stack(to_codes(held, tensors), bias)
        (entry,) = held.codes()
        assert entry.out is not None and entry.inp is not None
        matrix = tensors[entry.name]
        return Stack(matrix if entry.out.dim < entry.inp.dim else matrix.transpose(1, 2), bias)

    def _name(self, held: HeldLinear, kind: str) -> str:
        return f"{held.linear.name.rpartition('.')[2]}{held.linear.joiner}{kind}"


class Mixture:
    """The experts of a block, their router and what is shared; a summand of the residual stream.

    Its weights are under their own names in the block, ``layer``.
    """

    def __init__(
        self, made_of: block.Experts, hold: Hold, group: TPGroup, layer: nn.Module, dtype: torch.dtype | None
    ) -> None:
        self._group = group
        self._stacks = Stacks(made_of, hold, dtype)
        attach(layer, made_of.down.name.rpartition(".")[0], self._stacks)
        self._router = Router(made_of, hold, layer, dtype)  # which may have a name inside of the experts'
        self._shared: MLP | None = None
        self._shared_gate: ReplicatedLinear | None = None
        if made_of.shared is not None:
            self._shared = MLP(made_of.shared, hold, group, dtype)
            attach(layer, made_of.shared.down.name.rpartition(".")[0], self._shared)
        if made_of.shared_gate is not None:
            self._shared_gate = SharedGate(hold(made_of.shared_gate), dtype)
            attach(layer, made_of.shared_gate.name, self._shared_gate)

    def summand(self, rows: Rows) -> tuple[Mixture, Rows]:
        """What the residual stream adds: this, of its input."""
        return self, rows

    @cached_property
    def _parts(self) -> MixtureParts:
        """What is around the experts, once it is loaded."""
        router, shared_gate = self._router, self._shared_gate
        return MixtureParts(
            count=len(router.gate.weight),
            per_token=router.per_token,
            routing=router.routing,
            gate=router.gate.weight,
            bias=router.gate.bias,
            correction=router.correction,
            shared=self._shared,
            shared_gate=None if shared_gate is None else shared_gate.weight.view(-1),
        )

    def local(self, rows: Rows) -> Tensor:
        """This rank's partial sum of normed [T, H]."""
        if isinstance(self._stacks.weights, FusedExperts):
            return self._stacks.weights.mixture(rows, self._parts)
        x = rows.x if rows.norm is None else rows.norm(rows.x)
        assert self._stacks.weights is not None, "Decoder.use comes first"
        total = self._stacks.weights(x, *self._router(x))
        if self._shared is not None:
            shared = self._shared.local(Rows(x))
            total += shared if self._shared_gate is None else shared * self._shared_gate(x).sigmoid()
        return total

    def partial(self, rows: Rows) -> Tensor:
        if isinstance(self._stacks.weights, FusedExperts):
            return self._stacks.weights.mixture(rows, self._parts, partial=True)
        return self.local(rows)

    def add_to(self, residual: Tensor, rows: Rows) -> None:
        if isinstance(self._stacks.weights, FusedExperts):
            self._stacks.weights.mixture(rows, self._parts, residual)
        else:
            residual.add_(self.local(rows))

    def __call__(self, rows: Rows) -> Tensor:
        return self._group.all_reduce(self.local(rows))


class ExpertMaker(WeightMaker, Protocol):
    """What gives a mixture the ``ExpertWeights`` of its device."""

    def experts(self, gate_up: Stack, down: Stack, gating: Gating, first: int) -> ExpertWeights:
        """Of those from number ``first`` on."""
        ...
