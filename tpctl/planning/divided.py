"""What other engines divide by the number of ranks, as they see a model: heads, axes of linears and of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tpctl.arch.block import Attention, Experts, Gated, Layer, LayerPart, Mixer, linears
from tpctl.arch.linear import Linear
from tpctl.arch.storage import Storage
from tpctl.partition.cuts import KVHeads, Whole
from tpctl.partition.split import Rule


@dataclass(frozen=True)
class Scales:
    """What a format's scales are of: blocks of ``out`` x ``inp`` features, or groups of ``inp`` where ``out`` is 1.

    ``kind``: "fp8" (``weight_scale_inv`` beside it: "fp8 native"), "int", "nvfp4" or "mxfp4".
    """

    kind: str
    out: int
    inp: int


@dataclass(frozen=True)
class Heads:
    """Attention, or another mixer with heads; ``kv`` 0: it has no KV heads. Of a ``recurrent`` one these keep nothing,
    and nobody copies them."""

    query: int
    kv: int
    recurrent: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis of a linear that is divided: output features in one or more parts (``columns``) or input features
    (``rows``), of experts or not.

    Attributes:
        parts: their lengths, and beyond how many ranks they are copied instead (0: never).
        other: the length of the axis that is not divided.
    """

    name: str
    kind: str
    parts: tuple[tuple[int, int], ...]
    other: int
    experts: bool
    scales: Scales | None

    def a_rank(self, tp_size: int) -> Iterator[tuple[int, int]]:
        """Each part's length and how many ranks divide it."""
        for length, most in self.parts:
            yield length, min(tp_size, most) if most else tp_size


def heads(layer: Layer) -> Heads:
    mixer = layer.mixer
    return Heads(mixer.num_heads, mixer.num_kv_heads, isinstance(mixer, Mixer) and mixer.recurrent)


def axes(layer: Layer) -> Iterator[Axis]:
    """The divided axes of ``layer``'s linears."""
    for part in layer.parts:
        if isinstance(part, Experts):
            for linear in (part.gate_up, part.down):
                yield from _axis(linear, part)
            if part.shared is not None:
                for linear in linears(part.shared):
                    yield from _axis(linear, part.shared)
        elif isinstance(part, Attention | Mixer | Gated):
            for linear in linears(part):
                yield from _axis(linear, part)


def _axis(linear: Linear, part: LayerPart) -> Iterator[Axis]:
    experts, scales = linear.stack is not None, _scales(linear.storage, linear.inputs)
    if linear.rule is Rule.ROW:
        yield Axis(linear.name, "rows", ((linear.inputs, 0),), linear.outputs, experts, scales)
        return
    cut = [one for one in linear.parts if not isinstance(one.cut, Whole)]
    parts = tuple((one.length, one.cut.num_kv_heads if isinstance(one.cut, KVHeads) else 0) for one in cut)
    if parts:
        yield Axis(linear.name, "columns", parts, linear.inputs, experts, scales)


def _scales(storage: Storage, inputs: int) -> Scales | None:
    """``None``: of a dense weight, and where scales are of whole rows (of ``inputs``) or of the whole weight. A block
    may have more inputs than there are."""
    found = [
        (entry, 1 if entry.out.packed else entry.out.unit, entry.inp.unit)
        for entry in storage
        if entry.inp and entry.out and not entry.inp.packed
    ]
    divided = [(entry, out, inp) for entry, out, inp in found if inp > 1 and (inp < inputs or out > 1)]
    if not divided:
        return None
    (entry, out, inp), values = divided[0], storage.entries[0].dtypes or ()
    if "F8_E4M3" in values:
        kind = "fp8 native" if entry.name.endswith("scale_inv") else "fp8"
    elif "U8" in values:
        kind = "nvfp4" if "F8_E4M3" in (entry.dtypes or ()) else "mxfp4"
    else:
        kind = "int"
    return Scales(kind, out, inp)
