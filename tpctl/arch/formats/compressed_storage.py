"""The tensors of a linear [N, K] by format and scales of compressed-tensors.

    float-, int-, naive-quantized  weight e4m3 or I8 [N, K]; weight_zero_point like the scale, where it is asymmetric
    pack-quantized                 weight_packed I32 [N, K·bits/32], lowest bits first; weight_zero_point
                                   I32 [N·bits/32, …], packed along N; weight_shape; weight_g_idx I32 [K] where inputs
                                   are of groups in another order
    nvfp4-pack-quantized           weight_packed U8 [N, K/2], low nibble first; weight_scale e4m3 [N, K/16];
                                   weight_global_scale [1]
    mxfp4-pack-quantized           weight_packed likewise; weight_scale U8 [N, K/32], a power of two, plus 127

``weight_scale`` is [1] by tensor, [N, 1] by channel, [N, ceil(K/g)] by group, [ceil(N/r), ceil(K/c)] by block
(compressed-tensors 0.20, ``compressors/``, ``quantization/lifecycle/initialize.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpctl.arch.formats.fp8 import E4M3
from tpctl.arch.storage import Axis, Coding, Entry, Storage
from tpctl.errors import UnsupportedModelError

FLOATS = ("F32", "BF16", "F16")
PLAIN = ("float-quantized", "int-quantized", "naive-quantized")
PACKED, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = (*PLAIN, PACKED, NVFP4, MXFP4)
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
PACKED_BITS = (2, 4, 8)
"""Others are packed over the borders of words."""

NVFP4_GROUP, MXFP4_GROUP = 16, 32


@dataclass(frozen=True)
class Weights:
    """``weights`` of a group.

    Attributes:
        group: inputs that share a scale, where that is the ``strategy``; ``block`` likewise.
        reordered: which group an input is of, ``weight_g_idx`` says.
    """

    bits: int
    is_float: bool
    strategy: str
    group: int
    block: tuple[int, int]
    symmetric: bool
    reordered: bool

    def __str__(self) -> str:
        scales = {"group": f"in groups of {self.group}", "block": f"in blocks of {self.block[0]} x {self.block[1]}"}
        kind = "FP" if self.is_float else "INT"
        return f"{kind}{self.bits} {scales.get(self.strategy, f'by {self.strategy}')}"


@dataclass(frozen=True)
class Activations:
    """Of static ones.

    Attributes:
        by_group: they have a factor for all, and others for groups.
        local: these are found anew for each input.
    """

    by_group: bool
    local: bool


def storage(
    name: str,
    kind: str,
    weights: Weights,
    inputs: Activations | None,
    outputs: Activations | None,
    *,
    rounds: bool = False,
) -> Storage:
    """The storage of the linears of group ``name`` in format ``kind``; ``rounds``: their inputs are rounded as well.

    Raises:
        UnsupportedModelError: the format has no such weights, or tpctl does not know it with them.
    """
    made = {PACKED: _packed, NVFP4: _nvfp4, MXFP4: _mxfp4}.get(kind, _plain)(name, kind, weights)
    if rounds and kind in PLAIN and made.coding is not None:
        made = replace(made, coding=replace(made.coding, rounds=True))
    return replace(made, entries=(*made.entries, *_activations("input", inputs), *_activations("output", outputs)))


def _plain(name: str, kind: str, weights: Weights) -> Storage:
    if (weights.is_float and weights.bits != 8) or not 1 <= weights.bits <= 8 or weights.strategy == "tensor_group":
        raise _unknown(name, kind, weights)
    scale = _scale(weights)
    entries = [Entry(".weight", "weight", E4M3 if weights.is_float else ("I8",), Axis(0), Axis(1)), scale]
    if not weights.symmetric:
        zeros = E4M3 if weights.is_float else ("I8", "U8", "I32")
        entries.append(_zeros(scale, zeros))
    coding = Coding("e4m3") if weights.is_float else Coding("int")
    return Storage(str(weights), (*entries, *_order(weights)), coding=coding)


def _packed(name: str, kind: str, weights: Weights) -> Storage:
    if weights.is_float or weights.bits not in PACKED_BITS or weights.strategy not in ("tensor", "channel", "group"):
        raise _unknown(name, kind, weights)
    word, scale = 32 // weights.bits, _scale(weights)
    entries = [Entry(".weight_packed", "weight_packed", ("I32",), Axis(0), Axis(1, word, packed=True)), scale]
    if not weights.symmetric:
        if scale.out is None:  # the library packs only those of which there is one an output
            raise _unknown(name, kind, weights)
        entries.append(replace(_zeros(scale, ("I32",)), out=Axis(0, word, packed=True)))
    coding = Coding("uint", weights.bits, zero=1 << (weights.bits - 1))
    return Storage(f"{weights}, packed", (*entries, *_order(weights)), (".weight_shape",), coding=coding)


_FP4 = Entry(".weight_packed", "weight_packed", ("U8",), Axis(0), Axis(1, 2, packed=True))


def _nvfp4(name: str, kind: str, weights: Weights) -> Storage:
    known = weights.is_float and weights.bits == 4 and weights.symmetric and not weights.reordered
    if not known or weights.group != NVFP4_GROUP or weights.strategy != "tensor_group":
        raise _unknown(name, kind, weights)
    return Storage(
        "NVFP4",
        (
            _FP4,
            Entry(".weight_scale", "weight_scale", E4M3, Axis(0), Axis(1, NVFP4_GROUP), role="scales"),
            Entry(".weight_global_scale", "weight_global_scale", ("F32",), role="divisor"),
        ),
        coding=Coding("e2m1", 4),
    )


def _mxfp4(name: str, kind: str, weights: Weights) -> Storage:
    known = weights.is_float and weights.bits == 4 and weights.symmetric and not weights.reordered
    if not known or weights.group != MXFP4_GROUP or weights.strategy != "group":
        raise _unknown(name, kind, weights)
    scale = Entry(".weight_scale", "weight_scale", ("U8", "F8_E8M0"), Axis(0), Axis(1, MXFP4_GROUP), role="scales")
    return Storage("MXFP4, packed", (_FP4, scale), coding=Coding("e2m1", 4))


def _scale(weights: Weights) -> Entry:
    out: Axis | None = Axis(0)
    inp: Axis | None = None
    tail: tuple[int, ...] = ()
    match weights.strategy:
        case "tensor":
            out = None
        case "channel":
            tail = (1,)
        case "block":
            out, inp = Axis(0, weights.block[0]), Axis(1, weights.block[1])
        case _:
            inp = Axis(1, weights.group, dealt=not weights.reordered)
    return Entry(".weight_scale", "weight_scale", FLOATS, out, inp, tail, role="scales")


def _zeros(scale: Entry, dtypes: tuple[str, ...]) -> Entry:
    return replace(scale, suffix=".weight_zero_point", name="weight_zero_point", dtypes=dtypes, role="zeros")


def _order(weights: Weights) -> tuple[Entry, ...]:
    """Of each input, its group."""
    by_group = weights.reordered and weights.strategy == "group"
    return (Entry(".weight_g_idx", "weight_g_idx", ("I32",), None, Axis(0), role="order"),) if by_group else ()


def _activations(which: str, found: Activations | None) -> tuple[Entry, ...]:
    """Factors that a checkpoint may have: packers leave out those that are 1."""
    if found is None:
        return ()
    names = [f"{which}_global_scale"] if found.by_group else []
    if not found.local:
        names += [f"{which}_scale", f"{which}_zero_point"]
    codes = ("I8", "F8_E4M3")
    return tuple(
        Entry(f".{one}", one, codes if one.endswith("point") else FLOATS, optional=True, role="inputs") for one in names
    )


def _unknown(name: str, kind: str, weights: Weights) -> UnsupportedModelError:
    uneven = "" if weights.symmetric else " with zero points"
    return UnsupportedModelError(
        f"config.json: weights of {name} are {weights}{uneven} in the format {kind}, which tpctl does not know; use "
        "another checkpoint or its unquantised original"
    )
