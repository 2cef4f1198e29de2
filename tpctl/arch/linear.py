"""The parts of a layer that have weights: linears, norms, and what there is for each head or channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tpctl.arch.storage import DENSE, Axis, Entry, Storage
from tpctl.errors import UnsupportedModelError
from tpctl.partition.cuts import Cut, Whole
from tpctl.partition.split import Part, Rule, Stack, TensorSplit, tensor_names


@dataclass(frozen=True)
class Norm:
    """RMSNorm of ``size`` elements; with ``unit_offset`` (Gemma) the factor is 1 + weight.

    ``cut`` deals the elements of a norm over all heads at once. ``centred``: the mean is taken off first (LayerNorm).
    ``once``: the product with the weight is rounded, and not what is multiplied (Gemma 4, OLMo).
    ``source``: what a checkpoint calls it, where that is not its ``name``.
    """

    name: str
    size: int
    eps: float
    unit_offset: bool = False
    cut: Cut | None = None
    centred: bool = False
    source: str = ""
    once: bool = False

    def splits(self) -> Iterator[TensorSplit]:
        source = f"{self.source or self.name}.weight"
        yield from Vector(f"{self.name}.weight", self.size, self.cut, source=source).splits()


@dataclass(frozen=True)
class Vector:
    """Numbers that ``cut`` deals to the ranks, ``None``: that all of them have; ``tail``: lengths of further axes.

    ``sections``: it is several vectors below each other (label, size, cut), each of which is dealt by its own cut.
    ``source``: what a checkpoint calls it, where that is not its ``name``.
    """

    name: str
    size: int
    cut: Cut | None = None
    tail: tuple[int, ...] = ()
    sections: tuple[tuple[str, int, Cut], ...] = ()
    source: str = ""

    def splits(self) -> Iterator[TensorSplit]:
        source, whole = self.source or self.name, self.cut is None and not self.sections
        sections = self.sections or (("", self.size, self.cut or Whole()),)
        rule = Rule.REPLICATED if whole else Rule.COLUMN
        yield TensorSplit(self.name, rule, below(source, sections), others=self.tail)


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b``, with W [out, in].

    Attributes:
        name: of the stored tensors, less ``joiner`` and what kind of tensor it is (``weight``, ``bias``).
        rule: what its output means to the ranks.
        parts: the output features, in the order in which they are stored; ``source`` less the tensors' suffixes.
        inputs: input features, dealt to the ranks by ``input_cut``: ``Whole`` but for row-parallel linears.
        bias: there is one; ``bias_suffix`` is its name in a checkpoint, behind the source's.
        storage: the tensors that W is stored as.
        stack: it is one linear an expert.
    """

    name: str
    rule: Rule
    parts: tuple[Part, ...]
    inputs: int
    input_cut: Cut = Whole()  # noqa: RUF009 (it is frozen)
    bias: bool = False
    storage: Storage = DENSE
    stack: Stack | None = None
    joiner: str = "."
    bias_suffix: str = ".bias"

    @property
    def outputs(self) -> int:
        """Output features of all ranks together."""
        return sum(part.length for part in self.parts)

    def unread(self) -> Iterator[str]:
        """The names of tensors that no rank needs."""
        for suffix in self.storage.unread:
            for source in dict.fromkeys(part.source for part in self.parts):
                yield from (name + suffix for name in tensor_names(source, self.stack.count if self.stack else 0))

    def constants(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """What the tensors must hold that say no more than the shape of a weight, by their names."""
        if not self.storage.constants:
            return
        outputs: dict[str, int] = {}
        for part in self.parts:
            outputs[part.source] = max(part.offset + part.length, outputs.get(part.source, 0))
        for source, rows in outputs.items():
            for name in tensor_names(source, 0 if self.stack is None else self.stack.count):
                yield from ((name + suffix, (rows, self.inputs)) for suffix in self.storage.constants)

    def ordered(self) -> Iterator[tuple[str, int]]:
        """What the tensors must hold that say which group an input is of, by their names: how many are in one."""
        if self.storage.ordered is None:
            return
        suffix, group = self.storage.ordered
        for source in dict.fromkeys(part.source for part in self.parts):
            for name in tensor_names(source, 0 if self.stack is None else self.stack.count):
                yield name + suffix, group

    def free_orders(self) -> Iterator[tuple[str, int]]:
        """The tensors that put inputs into groups in any order, by their names: how many groups have scales."""
        by_role = {entry.role: entry for entry in self.storage}
        order, scales = by_role.get("order"), by_role.get("scales")
        if self.storage.ordered is not None or order is None or scales is None or scales.inp is None:
            return
        for source in dict.fromkeys(part.source for part in self.parts):
            for name in tensor_names(source, 0 if self.stack is None else self.stack.count):
                yield name + order.suffix, scales.inp.entries(self.inputs)

    def splits(self) -> Iterator[TensorSplit]:
        for entry in self.storage:
            yield self._split(entry)
        if self.bias:
            parts = tuple(replace(part, source=part.source + self.bias_suffix) for part in self.parts)
            # Of a row-parallel linear it is whole on every rank, and added by rank 0 alone.
            rule = self._whole_rule if self.rule is Rule.ROW else self.rule
            yield TensorSplit(f"{self.name}{self.joiner}bias", rule, parts, stack=self.stack)

    @property
    def _whole_rule(self) -> Rule:
        """Of a tensor that no cut of features divides: all ranks have it, or those that have the expert."""
        dealt = self.stack is not None and not isinstance(self.stack.cut, Whole)
        return Rule.EXPERTS if dealt else Rule.REPLICATED

    def _split(self, entry: Entry) -> TensorSplit:
        name = f"{self.name}{self.joiner}{entry.name}"
        if self.rule is Rule.ROW:
            return self._by_inputs(name, entry)
        axis = entry.out
        if axis is None:  # one for each part, such as a scale of the whole weight
            shape = entry.shape(self.outputs, self.inputs)
            labels: dict[str, str] = {}
            for part in self.parts:
                labels[part.source] = "" if part.source in labels else part.label
            if entry.last:
                labels = {max(labels): ""}
            apart = tuple(Part(source, shape[0], Whole(), label=label) for source, label in labels.items())
            return self._made(name, self._whole_rule, entry, apart, 0, shape)
        parts = tuple(_entries(part, axis, entry.suffix) for part in self.parts)
        return self._made(name, self.rule, entry, parts, axis.dim, entry.shape(self.outputs, self.inputs))

    def _by_inputs(self, name: str, entry: Entry) -> TensorSplit:
        (part,) = self.parts
        shape, axis = entry.shape(part.length, self.inputs), entry.inp
        if axis is None or not axis.dealt:
            whole = Part(part.source, shape[0], Whole(), label=part.label)
            return self._made(name, self._whole_rule, entry, (whole,), 0, shape)
        columns = Part(part.source, axis.entries(self.inputs), axis.cut(self.input_cut, self.inputs), label=part.label)
        return self._made(name, self.rule, entry, (columns,), axis.dim, shape)

    def _made(
        self, name: str, rule: Rule, entry: Entry, parts: tuple[Part, ...], dim: int, shape: tuple[int, ...]
    ) -> TensorSplit:
        parts = tuple(replace(part, source=part.source + entry.suffix) for part in parts)
        others = shape[:dim] + shape[dim + 1 :]
        return TensorSplit(name, rule, parts, dim, others, self.stack, entry.dtypes, entry.optional)


Weight = Linear | Norm | Vector


def _entries(part: Part, axis: Axis, suffix: str) -> Part:
    """The entries that a tensor has for the features of ``part``. One that says something of features (a scale) may be
    that of two parts, where the first of them ends inside a block; a word of packed values may not."""
    first, before = divmod(part.offset, axis.unit)
    if before and axis.packed:
        raise UnsupportedModelError(
            f"{part.source}{suffix} packs {axis.unit} features in a word, but {part.label} begins at feature "
            f"{part.offset}, inside of one; such fused tensors cannot be cut"
        )
    length = axis.entries(part.offset + part.length) - first
    return replace(part, length=length, cut=axis.cut(part.cut, part.length, before), offset=first)


def below(source: str, sections: Iterable[tuple[str, int, Cut]]) -> tuple[Part, ...]:
    """The parts (label, length, cut) that lie below each other in one ``source``."""
    parts, offset = [], 0
    for label, length, cut in sections:
        parts.append(Part(source, length, cut, offset, label))
        offset += length
    return tuple(parts)
