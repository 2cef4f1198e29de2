"""Quantised formats, one file each: what a ``quantization_config`` says of each linear's tensors.

A format gives a ``Scheme``; all else follows from the ``Storage`` that it names for a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpctl.arch.fields import Fields
from tpctl.arch.formats import awq, compressed, fp8, gptq, modelopt, mxfp4
from tpctl.arch.formats.beside import KEYS
from tpctl.arch.formats.scheme import Scheme
from tpctl.errors import CheckpointError, UnsupportedModelError, shown

METHODS: Mapping[str, Callable[[Fields], Scheme]] = {
    "awq": awq.read,
    "compressed-tensors": compressed.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "modelopt": modelopt.read,
    "modelopt_fp4": modelopt.read,
    "mxfp4": mxfp4.read,
}
"""By ``quant_method``."""

_LOADED = "it is made while a model is loaded; shard its unquantised original"
_EXPORT = "use the model as compressed-tensors or fp8, or its unquantised original"

OTHERS: Mapping[str, str] = {
    "modelopt_mixed": f"it is by NVIDIA's ModelOpt; {_EXPORT}",
    "bitsandbytes": _LOADED,
    "hqq": _LOADED,
    "eetq": _LOADED,
    "quanto": _LOADED,
    "torchao": f"it is by torchao; {_EXPORT}",
    "fbgemm_fp8": f"it is by FBGEMM; {_EXPORT}",
    "quark": f"it is by AMD's Quark; {_EXPORT}",
    "auto-round": "it is in AutoRound's own format; export it as auto_gptq, auto_awq or llm_compressor",
    "intel/auto-round": "it is in AutoRound's own format; export it as auto_gptq, auto_awq or llm_compressor",
    "aqlm": "it is in codebooks; use its unquantised original",
    "vptq": "it is in codebooks; use its unquantised original",
    "bitnet": "it is in ternary weights; use its unquantised original",
}
"""What is known not to be supported, by ``quant_method``, and what to do."""


def read_scheme(fields: Fields, beside: Fields | None = None) -> Scheme | None:
    """The scheme of a ``config.json``; ``None``: its weights are floats.

    Args:
        beside: what ``hf_quant_config.json`` says, for one that says nothing.

    Raises:
        UnsupportedModelError: of a format that tpctl does not know.
        CheckpointError: it contradicts itself.
    """
    given = {key: fields.mapping(key) for key in KEYS}
    found = [(key, value) for key, value in given.items() if value]
    if not found:
        return modelopt.read_beside(beside) if beside is not None and beside.values else None
    if len(found) > 1 and found[0][1] != found[1][1]:
        raise CheckpointError("config.json has a quantization_config and a compression_config that differ; remove one")
    key, value = found[0]
    method = value.get("quant_method") or ("compressed-tensors" if key == "compression_config" else None)
    if method is None:
        raise CheckpointError(
            f"config.json: {key} has no quant_method, which says how the weights are stored; add the right one of "
            f"{', '.join(METHODS)}, or use the unquantised original"
        )
    if not isinstance(method, str) or method not in METHODS:
        why = OTHERS.get(method) if isinstance(method, str) else None
        known = f"tpctl knows {', '.join(METHODS)}; use one of these or its unquantised original"
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({shown(method)}), which is not supported: {why or known}"
        )
    return METHODS[method](fields.inside(key))
