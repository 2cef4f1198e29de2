"""Which tensors are quantised, which stay, and what they become: from names, dtypes and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Protocol

from tpctl.arch.formats.beside import is_quantised
from tpctl.arch.formats.skipped import is_stack
from tpctl.errors import CheckpointError, UnsupportedModelError
from tpctl.quantizing.schemes import SCHEMES, Method, Scheme
from tpctl.quantizing.stacks import Unstacked, Weight

FLOATS = frozenset({"BF16", "F16", "F32"})
"""Dtypes that weights are quantised from."""

_LAYER = re.compile(r"(?:model\.|model\.language_model\.|language_model\.model\.)layers\.(\d+)\.(.+)")
_LINEAR = re.compile(
    r"self_attn\.(?:(?:q|k|v|o|qkv|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa)"
    r"|(?:(?:mlp|block_sparse_moe)\.(?:experts\.\d+\.|shared_experts?\.)?|experts\.\d+\.)"
    r"(?:gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)"
    r"|per_layer_input_gate|per_layer_projection"
)
_KEPT = re.compile(
    r"(?:mlp|block_sparse_moe)\.(?:gate|router|shared_expert_gate)|router\.proj|linear_attn\..+"
    r"|eh_proj|embed_tokens|shared_head\.head"
)
"""Routers, gated delta nets (their states add up what rounding changes), and what layers that predict more tokens have
beside a layer's linears."""

_EMBEDDING = re.compile(r"(?:.*\.)?embed_tokens")
_HEAD = "lm_head"
_SCALE = re.compile(
    r"\.(?:weight_(?:scale\w*|packed|shape|zero_point|global_scale)|qweight|qzeros|scales|g_idx|\w+_blocks)$"
)
"""What formats of quantised checkpoints call the tensors that stand in a weight's place, or beside it."""


class Described(Protocol):
    """What is known of a tensor without its data."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def quantised_shapes(
    tensors: Mapping[str, Described], method: Method, stacks: Unstacked = Unstacked()
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of every tensor of a checkpoint of ``tensors`` once it is quantised by ``method``.

    Raises:
        UnsupportedModelError, CheckpointError: as ``linears``.
    """
    chosen = linears(tensors, method, stacks)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if name in chosen:
            for weight in chosen[name]:
                found.update(stored(weight, tensor.dtype, SCHEMES[method]))
        else:
            found[stacks.renamed.get(name, name)] = (tensor.dtype, tensor.shape)
    return found


def stored(weight: Weight, dtype: str, scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ``weight`` of ``dtype`` is stored as; numbers first, then scales, then the rest."""
    name, (rows, columns) = weight.name, weight.shape
    scales = (f"{name}_scale", (dtype, scheme.cells(weight.shape)))
    if scheme.kind == "float":
        return dict([(name, ("F8_E4M3", weight.shape)), scales])
    return dict([(f"{name}_packed", ("I32", (rows, columns // 8))), scales, (f"{name}_shape", ("I64", (2,)))])


def linears(
    tensors: Mapping[str, Described], method: Method, stacks: Unstacked = Unstacked()
) -> dict[str, tuple[Weight, ...]]:
    """The weights that are quantised, by the tensors that hold them: all linears of the decoder's layers.

    Args:
        stacks: those of ``tensors`` that hold several.

    Raises:
        UnsupportedModelError: the checkpoint is quantised already.
        CheckpointError: a layer holds something that is no linear by itself, or one that ``method`` cannot cut into
            its groups.
    """
    found: dict[str, tuple[Weight, ...]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        module, _, suffix = match[2].rpartition(".")
        is_linear = suffix == "weight" and _LINEAR.fullmatch(module) is not None
        if is_linear or len(tensor.shape) > 1:
            _require_float(name, tensor, method)
        if is_linear:
            found[name] = (Weight(name, _matrix(name, tensor.shape)),)
        elif name in stacks.weights:
            for weight in stacks.weights[name]:
                _matrix(weight.name, weight.shape)
            found[name] = stacks.weights[name]
        elif len(tensor.shape) > 1 and not (suffix == "weight" and _KEPT.fullmatch(module)):
            raise CheckpointError(
                f"{name} {list(tensor.shape)} is no linear that --quantize {method} knows; leave out --quantize"
            )
    if not found:
        raise CheckpointError("no linear of a decoder layer is among the checkpoint's tensors; leave out --quantize")
    _require_whole_groups([weight for held in found.values() for weight in held], SCHEMES[method])
    return found


def cut_block(chosen: Mapping[str, tuple[Weight, ...]], scheme: Scheme) -> Weight | None:
    """The first of the ``chosen`` weights whose rows end within a block, if there is one.

    compressed-tensors stores it, but its inputs are in groups of that size too, and those must be whole.
    """
    if scheme.rows == 1 or scheme.columns is None:
        return None
    weights = (weight for found in chosen.values() for weight in found)
    return next((weight for weight in weights if weight.shape[1] % scheme.columns), None)


def ignored(tensors: Mapping[str, Described], stacks: Unstacked = Unstacked()) -> list[str]:
    """The modules that stay as they are, in the model's order: routers and the like, what is outside of the layers, the
    head.

    The head is one also where it is tied to the embedding, since there is a module of that name. Stacks of experts
    outside of the layers (of those that predict more tokens) are a pattern, for engines ask for each expert's name.
    """
    kept: list[tuple[int, str]] = []
    others: list[str] = []
    for old, tensor in tensors.items():
        name = stacks.renamed.get(old, old)
        module, _, suffix = name.rpartition(".")
        if is_stack(name) and old not in stacks.weights:
            others.append(rf"re:{re.escape(module)}\..*")
        if suffix != "weight" or len(tensor.shape) < 2:
            continue
        match = _LAYER.fullmatch(module)
        if match is None:
            others += [module] * (_EMBEDDING.fullmatch(module) is None and module != _HEAD)
        elif _KEPT.fullmatch(match[2]):
            kept.append((int(match[1]), module))
    return [*sorted(set(others)), *(module for _, module in sorted(kept)), _HEAD]


def refuse_quantised(folder: Path, names: Iterable[str], method: Method) -> None:
    """Refuse a model whose ``folder``, or a name of whose tensors, shows that it is quantised already.

    Raises:
        UnsupportedModelError: one does.
    """
    if (why := is_quantised(folder)) is not None:
        raise UnsupportedModelError(f"the model is quantised already ({why}); {_instead(method)}")
    for name in names:
        if _SCALE.search(name):
            raise UnsupportedModelError(f"the model is quantised already (it holds {name}); {_instead(method)}")


def _require_float(name: str, tensor: Described, method: Method) -> None:
    if tensor.dtype == "F64":
        raise CheckpointError(f"{name} is F64; --quantize {method} takes {', '.join(sorted(FLOATS))}")
    if tensor.dtype not in FLOATS:
        raise UnsupportedModelError(f"the model is quantised already ({name} is {tensor.dtype}); {_instead(method)}")


def _instead(method: Method) -> str:
    return f"leave out --quantize {method}, or give its unquantised original"


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{name} has the shape {list(shape)}, but a linear's weight has rows and columns")
    rows, columns = shape
    return rows, columns


def _require_whole_groups(weights: Sequence[Weight], scheme: Scheme) -> None:
    """Refuse weights whose columns the groups of ``scheme`` do not divide, as compressed-tensors does."""
    if scheme.strategy != "group" or scheme.columns is None:
        return
    for weight in weights:
        if (columns := weight.shape[1]) % scheme.columns:
            raise CheckpointError(
                f"{weight.name} has {columns} columns, which groups of {scheme.columns} do not divide; use --quantize "
                f"{_fitting(weights)}"
            )


def _fitting(weights: Iterable[Weight]) -> str:
    """What to quantise to, where some groups do not divide the columns of all ``weights``."""
    columns = gcd(*(weight.shape[1] for weight in weights))
    for method in (Method.INT4_G64, Method.INT4_G32):
        group = SCHEMES[method].columns
        if group is not None and columns % group == 0:
            return f"{method}, whose groups are of {group}"
    return f"{Method.FP8}, which has no groups"
