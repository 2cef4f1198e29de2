"""FP8 as DeepSeek, Qwen and Mistral publish it (``quant_method: fp8``).

In blocks: ``weight`` e4m3 [N, K] and ``weight_scale_inv`` [ceil(N/128), ceil(K/128)], one factor a block (float32,
bfloat16, or powers of two as e8m0). By tensor, where ``weight_block_size`` is null: one factor, ``weight_scale_inv``
or, as vLLM reads it, ``weight_scale``. A value times its factor is the weight. With static activations, one more
factor for the linear's input (transformers 5, ``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tpctl.arch.fields import Fields
from tpctl.arch.formats.skipped import Skipped, is_stack
from tpctl.arch.storage import Axis, Coding, Entry, Storage
from tpctl.errors import UnsupportedModelError, shown

E4M3 = ("F8_E4M3",)
CODING = Coding("e4m3", rounds=True)
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_BYTES = (*SCALES, "U8")
"""Powers of two may be stored as bytes."""

KEPT = (
    *(f"self_attn.{name}_scale" for name in ("q", "k", "v", "kv")),
    *(f"self_attn.{name}_proj.{name}_scale" for name in ("k", "v")),
)
"""Scales of a cache of keys and values in FP8, which no rank needs: the cache is kept in the model's dtype."""

KNOWN = {"fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("float", "ue8m0"), "expert_dtype": ("fp8",)}
"""Fields and what they may say. MiniMax' models have torch's name of the dtype where others have the short one."""

_MOST = 4096


@dataclass(frozen=True)
class FP8:
    """All linears but ``skipped`` are ``stored`` so; ``stacks``: experts that a checkpoint stacks."""

    stored: Storage
    stacks: Storage
    skipped: Skipped
    unused: tuple[str, ...] = KEPT

    def storage(self, names: Sequence[str]) -> Storage | None:
        if self.skipped.any_of(names):
            return None
        return self.stacks if is_stack(names[0]) else self.stored


def read(fields: Fields) -> FP8:
    for key, known in KNOWN.items():
        if (value := fields.get(key)) is not None and value not in known:
            raise UnsupportedModelError(
                f"config.json: {key} of the quantised weights is {shown(value)}, tpctl knows {' and '.join(known)}"
            )
    if more := fields.names("modules_to_convert"):
        raise UnsupportedModelError(
            f"config.json: modules_to_convert names {shown(more[0])}; tpctl cuts embeddings of floats, none in FP8"
        )
    activation = fields.get("activation_scheme") or "dynamic"
    if activation not in ("dynamic", "static"):
        raise UnsupportedModelError(
            f"config.json: activation_scheme of the quantised weights is {shown(activation)}, tpctl knows dynamic and "
            "static"
        )
    static = activation == "static"
    key = "modules_to_not_convert" if fields.get("modules_to_not_convert") is not None else "ignored_layers"
    skipped = Skipped(fields.names(key)).check(key)
    scales = SCALE_BYTES if fields.get("scale_fmt") == "ue8m0" else SCALES
    by_tensor = tensor_storage("weight_scale", "input_scale", static=static)
    block = fields.get("weight_block_size")
    if block is None and "weight_block_size" in fields:
        stored = replace(tensor_storage(static=static), others=(by_tensor,))
        return FP8(stored, stored, skipped)
    if block is None:  # transformers takes it for blocks, vLLM for whole tensors: the tensors' names tell
        stored = replace(block_storage(128, 128, scales=scales, static=static), others=(by_tensor,))
        return FP8(stored, _stacked(128, 128, scales), skipped)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= _MOST for n in block):
        raise UnsupportedModelError(
            f"config.json: weight_block_size is {shown(block)}, tpctl knows blocks, such as [128, 128], and null"
        )
    out, inp = block
    return FP8(block_storage(out, inp, scales=scales, static=static), _stacked(out, inp, scales), skipped)


def block_storage(
    out: int, inp: int, scale: str = "weight_scale_inv", scales: tuple[str, ...] = SCALES, *, static: bool = False
) -> Storage:
    """e4m3 with one ``scale`` for each block of ``out`` x ``inp`` features."""
    return Storage(
        f"FP8 in blocks of {out} x {inp}",
        (
            Entry(".weight", "weight", E4M3, Axis(0), Axis(1)),
            Entry(f".{scale}", scale, scales, Axis(0, out), Axis(1, inp), role="scales"),
            *_activation("activation_scale", static),
        ),
        coding=CODING,
    )


def tensor_storage(
    scale: str = "weight_scale_inv", activation: str = "activation_scale", *, static: bool = False
) -> Storage:
    """e4m3 with one ``scale`` for all of it, and one for its input where that is ``static``."""
    return Storage(
        "FP8 by tensor",
        (
            Entry(".weight", "weight", E4M3, Axis(0), Axis(1)),
            Entry(f".{scale}", scale, SCALES, role="scales"),
            *_activation(activation, static),
        ),
        coding=CODING,
    )


def _activation(name: str, static: bool) -> tuple[Entry, ...]:
    return (Entry(f".{name}", name, SCALES, role="inputs"),) if static else ()


def _stacked(out: int, inp: int, scales: tuple[str, ...]) -> Storage:
    """As transformers names them: ``experts.gate_up_proj`` and ``experts.gate_up_proj_scale_inv``."""
    return Storage(
        f"FP8 in blocks of {out} x {inp}",
        (
            Entry("", "weight", E4M3, Axis(0), Axis(1)),
            Entry("_scale_inv", "weight_scale_inv", scales, Axis(0, out), Axis(1, inp), role="scales"),
        ),
        coding=CODING,
    )
