"""The rotary embedding that a GGUF's keys and tensors describe, as ``rope_parameters`` of a transformers 5 config.

llama.cpp knows four ways to stretch it. Linear: ``rope.scaling.factor``, or ``rope.scale_linear`` in old files. YaRN:
the same and ``rope.scaling.type``. Long RoPE (Phi-3.5, Phi-4-mini): two tensors with a divisor per frequency, of which
llama.cpp takes one for the whole run and transformers one by the sequence's length. Llama 3's: by its result alone,
one divisor per frequency in ``rope_freqs.weight``.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from math import isclose, isfinite, log, pi, sqrt
from sys import byteorder
from typing import Any

from tpctl.checkpoint.gguf.block_types import F32
from tpctl.checkpoint.gguf.header import GgufError, GgufTensor
from tpctl.checkpoint.gguf.metadata import OTHER, Metadata

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({LLAMA3, LONG, SHORT})

_LLAMA3_ORIGINAL = 8192
"""Context of every model that Llama 3's rule was published with; the file does not say it."""


def rope_parameters(
    metadata: Metadata, tensors: Mapping[str, GgufTensor], rotary_dim: int, context: int
) -> dict[str, Any]:
    """``rope_type``, ``rope_theta`` and what the type needs, for ``rotary_dim`` rotated dimensions of each head.

    Raises:
        GgufError: the file asks for something else, or contradicts itself.
    """
    theta = metadata.number(".rope.freq_base", 10000.0)
    kind = metadata.text(".rope.scaling.type", "")
    factor = metadata.number(".rope.scaling.factor", 0.0) or metadata.number(".rope.scale_linear", 0.0) or 1.0
    original = metadata.integer(".rope.scaling.original_context_length", 0)
    metadata.ignore(".rope.scaling.finetuned", ".rope.scale_linear")
    if theta <= 0 or factor <= 0:
        raise GgufError(f"its RoPE base {theta} and factor {factor} are not both positive; download it again")
    if LONG in tensors or SHORT in tensors:
        if kind not in ("", "none", "longrope") or factor != 1.0 or LLAMA3 in tensors:
            raise GgufError(f"it has long RoPE and another RoPE scaling ({kind or factor}) at once; {OTHER}")
        return {"rope_theta": theta, **_longrope(metadata, tensors, rotary_dim // 2, context, original)}
    metadata.only(".rope.scaling.attn_factor", 1.0)
    if LLAMA3 in tensors:
        if kind not in ("", "none") or (kind != "none" and factor != 1.0):
            raise GgufError(f"it has RoPE divisors and another RoPE scaling ({kind or factor}) at once; {OTHER}")
        return {"rope_theta": theta, **_llama3(_values(tensors[LLAMA3], rotary_dim // 2), theta)}
    if kind == "none" or (kind in ("", "linear") and factor == 1.0):
        return {"rope_theta": theta, "rope_type": "default"}
    if kind in ("", "linear"):
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_theta": theta, **_yarn(metadata, factor, original)}
    raise GgufError(f"its RoPE scaling {kind!r} cannot be converted; {OTHER}")


def _yarn(metadata: Metadata, factor: float, original: int) -> dict[str, Any]:
    """Both sides multiply cos and sin by 0.1 ln(factor) + 1, and mean the same by the betas."""
    metadata.only(".rope.scaling.yarn_ext_factor", 1.0)
    metadata.only(".rope.scaling.yarn_attn_factor", 1.0)
    metadata.only(".rope.scaling.yarn_log_multiplier", 0.0)
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original:
        found["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        if metadata.has(f".rope.scaling.yarn_{name}"):
            found[name] = metadata.number(f".rope.scaling.yarn_{name}")
    return found


def _longrope(
    metadata: Metadata, tensors: Mapping[str, GgufTensor], pairs: int, context: int, original: int
) -> dict[str, Any]:
    for name, other in ((SHORT, LONG), (LONG, SHORT)):
        if name not in tensors:
            raise GgufError(f"it has {other} but no {name}; download it again")
    if not original:
        raise GgufError(f"it has long RoPE but no {metadata.full('.rope.scaling.original_context_length')}; {OTHER}")
    scale = context / original
    usual = sqrt(1 + log(scale) / log(original)) if scale > 1 and original > 1 else 1.0
    if usual != 1.0 and not metadata.has(".rope.scaling.attn_factor"):
        raise GgufError(f"it has long RoPE but no {metadata.full('.rope.scaling.attn_factor')}; {OTHER}")
    attention = metadata.number(".rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "longrope",
        "short_factor": _values(tensors[SHORT], pairs),
        "long_factor": _values(tensors[LONG], pairs),
        "original_max_position_embeddings": original,
        # transformers computes the usual one in float64.
        **({} if isclose(attention, usual, rel_tol=1e-6) else {"attention_factor": attention}),
    }


def _llama3(divisors: list[float], theta: float) -> dict[str, Any]:
    """The rule behind ``divisors``: its factor is the largest of them, the rest is the same in every Llama 3 model, and
    it is accepted only if it gives back all of them."""
    if set(divisors) == {1.0}:
        return {"rope_type": "default"}
    rule = {"factor": max(divisors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = llama3_divisors(len(divisors), theta, _LLAMA3_ORIGINAL, **rule)
    if any(abs(a - b) > 1e-2 * b for a, b in zip(divisors, expected, strict=True)):
        raise GgufError(f"its RoPE divisors follow no known rule; {OTHER}")
    return {"rope_type": "llama3", **rule, "original_max_position_embeddings": _LLAMA3_ORIGINAL}


def llama3_divisors(
    count: int, theta: float, original: int, *, factor: float, low_freq_factor: float, high_freq_factor: float
) -> list[float]:
    """What Llama 3's rule (its 3.1 release) divides each of ``count`` RoPE frequencies by."""
    divisors = []
    for index in range(count):
        turns = original * theta ** (-index / count) / (2 * pi)  # full turns within the original context
        if turns > high_freq_factor:
            divisors.append(1.0)
        elif turns < low_freq_factor:
            divisors.append(factor)
        else:
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return divisors


def _values(tensor: GgufTensor, count: int) -> list[float]:
    """The ``count`` numbers of a small float32 tensor."""
    if tensor.type != F32 or tensor.shape != (count,):
        raise GgufError(
            f"tensor {tensor.name} is {tensor.block.name} of shape {list(tensor.shape)}, but F32 of [{count}] is needed"
        )
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        numbers = array("f", file.read(tensor.stop - tensor.start))
    if byteorder == "big":
        numbers.byteswap()
    if not all(isfinite(number) and number > 0 for number in numbers):
        raise GgufError(f"tensor {tensor.name} holds numbers that no frequency can be divided by; download it again")
    return list(numbers)
