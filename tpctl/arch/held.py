"""What one rank has of a linear: which of its features, and where among the rank's tensors each of them is found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from tpctl.arch.linear import Linear
from tpctl.arch.storage import Axis, Entry
from tpctl.partition.cuts import Range
from tpctl.partition.plan import PartitionPlan, Shape
from tpctl.partition.split import Part, Rule


@dataclass(frozen=True)
class HeldLinear:
    """A rank's share of ``linear``.

    Attributes:
        name: of its tensors in the shard, less what kind of tensor it is.
        outputs: of each of the linear's parts, the features that the rank has; in the shard they are below each other.
        inputs: the input features.
        experts: of a mixture's; ``None``: it is one linear.
        adds_bias: of ranks whose outputs are summed, one alone adds the bias, this one.
        shapes: of its tensors in the shard that an engine reads, by kind (``weight``, ``weight_scale``, ``bias``).
        unread: the names of those that it does not read: what they say of activations, and what is known anyway.
    """

    linear: Linear
    name: str
    outputs: tuple[Range, ...]
    inputs: Range
    experts: Range | None
    adds_bias: bool
    shapes: Mapping[str, Shape]
    unread: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, linear: Linear, plan: PartitionPlan, rank: int, prefix: str = "", held: Collection[str] | None = None
    ) -> HeldLinear:
        """Of ``rank`` by ``plan``.

        Args:
            prefix: of the layer.
            held: the names of the shard's tensors, where some of the plan may be missing.
        """
        size, name = plan.tp_size, f"{prefix}{linear.name}{linear.joiner}"
        shard, known = plan.shards[rank], {"inputs", "shape", *(() if linear.storage.ordered is None else ("order",))}
        kinds = {entry.name: entry.role in known for entry in linear.storage} | ({"bias": False} if linear.bias else {})
        there = [kind for kind in kinds if name + kind in shard and (held is None or name + kind in held)]
        by_inputs = linear.rule is Rule.ROW
        experts = None if linear.stack is None else linear.stack.cut.ranges(linear.stack.count, size)
        return cls(
            linear,
            name,
            tuple(part.cut.ranges(part.length, size)[rank] for part in linear.parts),
            linear.input_cut.ranges(linear.inputs, size)[rank] if by_inputs else Range(0, linear.inputs),
            None if experts is None else experts[rank],
            not by_inputs or (0 if experts is None else experts.index(experts[rank])) == rank,
            {kind: shard[name + kind].shape for kind in there if not kinds[kind]},
            tuple(name + kind for kind in there if kinds[kind]),
        )

    @property
    def in_features(self) -> int:
        return len(self.inputs)

    @property
    def out_features(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def is_dense(self) -> bool:
        """Whether the weights are floats."""
        return self.linear.storage.coding is None

    @property
    def kept(self) -> frozenset[str]:
        """The kinds of its tensors whose dtype says what they mean, and stays."""
        return frozenset() if self.is_dense else frozenset(entry.name for entry in self.codes())

    def entry(self, role: str) -> Entry | None:
        """The tensor of that role, if the shard has one."""
        return next((one for one in self.linear.storage if one.role == role and one.name in self.shapes), None)

    def codes(self) -> Iterator[Entry]:
        """The tensors that the weights are made of, in their order."""
        roles = ("values", "scales", "zeros", "order", "divisor", "factor")
        return (one for one in self.linear.storage if one.role in roles and one.name in self.shapes)

    def rows(self, entry: Entry) -> list[int]:
        """Which entry of ``entry``'s tensor, along the outputs, is that of each output feature of the rank."""
        held = list(zip(self.linear.parts, self.outputs, strict=True))
        if entry.out is None:  # one for each source
            sources = list(dict.fromkeys(part.source for part in self.linear.parts))
            return [sources.index(part.source) for part, features in held for _ in range(len(features))]
        found: list[int] = []
        behind = 0
        for part, features in held:
            first, rows = _entries(entry.out, part, features)
            found.extend(row - first + behind for row in rows)
            behind += rows[-1] - first + 1 if len(rows) else 0
        return found

    def places(self, entry: Entry) -> list[int]:
        """As ``rows``, of a tensor whose entries are words of several outputs: the place among all their codes."""
        assert entry.out is not None and entry.out.packed, entry
        unit = entry.out.unit
        features = (
            part.offset + feature
            for part, held in zip(self.linear.parts, self.outputs, strict=True)
            for feature in range(held.start, held.stop)
        )
        return [row * unit + feature % unit for row, feature in zip(self.rows(entry), features, strict=True)]

    def within(self, entry: Entry) -> int:
        """How many input features before the rank's own its tensor's first entry is for, too."""
        axis = entry.inp
        if axis is None:
            return 0
        return self.inputs.start % axis.unit if axis.dealt else self.inputs.start


Hold = Callable[[Linear], HeldLinear]
"""Gives what a rank has of a linear of some layer."""


def _entries(axis: Axis, part: Part, features: Range) -> tuple[int, list[int]]:
    """The first entry that a rank has of a part, and that of each of its features, in the source's numbers."""
    places = range(part.offset + features.start, part.offset + features.stop)
    return places.start // axis.unit, [place // axis.unit for place in places]
