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
from torch import Tensor, nn

from tpctl.arch import block
from tpctl.arch.held import HeldLinear, Hold
from tpctl.arch.linear import Linear
from tpctl.distributed import TPGroup
from tpctl.layers.linear import NumbersLinear, ReplicatedLinear, declare, emptied
from tpctl.layers.mlp import MLP
from tpctl.layers.module import Layer, attach
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream import Rows
from tpctl.layers.weights.dense import WeightMaker
from tpctl.layers.weights.experts import CodedStack, DenseStack, ExpertWeights, Gating, MixtureParts, Scaled, Stack
from tpctl.layers.weights.stored import to_codes


class Gate(ReplicatedLinear):
    """The linear of a router, whose weights are read as they are."""

    def use(self, device: WeightMaker) -> None:
        """Nothing."""


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
            declare(self, held, dtype, self._prefix(held))

    def use(self, device: ExpertMaker) -> None:
        """Called once, after loading: let the device have them in its own form, which replaces the parameters."""
        gate_up, down = map(self._stack, self._held)
        self.weights = device.experts(gate_up, down, self._gating, self._first)
        for held in self._held:
            for kind in held.shapes:
                emptied(self, self._prefix(held) + kind)

    def _stack(self, held: HeldLinear) -> Stack:
        tensors = {kind: getattr(self, self._prefix(held) + kind) for kind in held.shapes}
        bias = tensors.get("bias") if held.adds_bias else None
        if not held.is_dense:
            return CodedStack(to_codes(held, tensors), bias)
        (entry,) = held.codes()
        assert entry.out is not None and entry.inp is not None
        matrix = tensors[entry.name]
        return DenseStack(matrix if entry.out.dim < entry.inp.dim else matrix.transpose(1, 2), bias)

    def _prefix(self, held: HeldLinear) -> str:
        return f"{held.linear.name.rpartition('.')[2]}{held.linear.joiner}"


class Mixture:
    """The experts of a block, their router and what is shared; a summand of the residual stream.

    Its weights are under their own names in the block, ``layer``.
    """

    def __init__(
        self, made_of: block.Experts, hold: Hold, group: TPGroup, layer: nn.Module, dtype: torch.dtype | None
    ) -> None:
        assert made_of.routing is not None
        self._group, self._routing, self._per_token = group, made_of.routing, made_of.per_token
        self._stacks = Stacks(made_of, hold, dtype)
        attach(layer, made_of.down.name.rpartition(".")[0], self._stacks)
        self._eps = made_of.router_eps
        self._vectors: list[tuple[nn.Module, str]] = []
        for one in made_of.router:  # whose names may be inside of the experts'
            if isinstance(one, Linear):
                self._gate = Gate(hold(one), dtype)
                attach(layer, one.name, self._gate)
            else:
                kept = torch.float32 if self._eps is None else dtype
                empty = nn.Parameter(torch.empty(one.size, dtype=kept), requires_grad=False)
                self._vectors.append(attach(layer, one.name, empty))
        self._shared: MLP | None = None
        self._shared_gate: ReplicatedLinear | None = None
        if made_of.shared is not None:
            self._shared = MLP(made_of.shared, hold, group, dtype)
            attach(layer, made_of.shared.down.name.rpartition(".")[0], self._shared)
        if made_of.shared_gate is not None:
            self._shared_gate = NumbersLinear(hold(made_of.shared_gate), dtype)
            attach(layer, made_of.shared_gate.name, self._shared_gate)

    def summand(self, rows: Rows) -> tuple[Mixture, Rows]:
        """What the residual stream adds: this, of its input."""
        return self, rows

    @cached_property
    def _parts(self) -> MixtureParts:
        """What is around the experts, once it is loaded."""
        shared_gate = self._shared_gate
        vectors = [getattr(*place) for place in self._vectors]
        correction = vectors[0] if vectors and self._eps is None else None
        return MixtureParts(
            count=len(self._gate.weight),
            per_token=self._per_token,
            routing=self._routing,
            gate=self._gate.weight,
            bias=self._gate.bias,
            correction=correction,
            shared=self._shared,
            shared_gate=None if shared_gate is None else shared_gate.weight.view(-1),
            scaled=None if self._eps is None else Scaled(vectors[0], self._eps),
            factors=None if self._eps is None else vectors[1],
        )

    @property
    def _experts(self) -> ExpertWeights:
        assert self._stacks.weights is not None, "Decoder.use comes first"
        return self._stacks.weights

    def local(self, rows: Rows) -> Tensor:
        """This rank's partial sum of normed [T, H]."""
        return self._experts.mixture(rows, self._parts)

    def partial(self, rows: Rows) -> Tensor:
        return self._experts.mixture(rows, self._parts, partial=True)

    def add_to(self, residual: Tensor, rows: Rows) -> None:
        self._experts.mixture(rows, self._parts, residual)

    def __call__(self, rows: Rows) -> Tensor:
        return self._group.all_reduce(self.local(rows))


class ExpertMaker(WeightMaker, Protocol):
    """What gives a mixture the ``ExpertWeights`` of its device."""

    def experts(self, gate_up: Stack, down: Stack, gating: Gating, first: int) -> ExpertWeights:
        """Of those from number ``first`` on."""
        ...


class BesideMLP:
    """Experts beside the dense ``mlp``, whose sums over the ranks are normed one by one; one all-reduce serves both."""

    def __init__(
        self,
        made_of: block.BesideMLP,
        mlp: MLP,
        hold: Hold,
        group: TPGroup,
        layer: nn.Module,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._group, self._mlp = group, mlp
        self._experts = Mixture(made_of.experts, hold, group, layer, dtype)
        norms = (made_of.after_mlp, made_of.before, made_of.after)
        self._after_mlp, self._before, self._after = (RMSNorm.of(one, dtype) for one in norms)
        for one, norm in zip(norms, (self._after_mlp, self._before, self._after), strict=True):
            attach(layer, one.name, norm)

    def __call__(self, read: Rows, residual: Tensor) -> Tensor:
        """[T, H], the whole sum: of what the MLP reads, and of the residual [T, H]."""
        own = self._mlp.local(read), self._experts.local(Rows(residual, self._before))
        mlp, experts = self._group.all_reduce(torch.stack(own))
        return self._after_mlp(mlp) + self._after(experts)  # type: ignore[no-any-return]
