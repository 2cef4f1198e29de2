"""What compressed-tensors makes of weights, as llm-compressor calls it: the oracle for ``tpctl.quantizing``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
    quantize,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    is_module_quantized,
    maybe_pad_tensor_for_block_quant,
)

from tpctl.quantizing.schemes import Method

PRESETS = {Method.FP8: "FP8_DYNAMIC", Method.FP8_BLOCK: "FP8_BLOCK", Method.INT4: "W4A16"}
GROUPS = {Method.INT4_G64: 64, Method.INT4_G32: 32}


def scheme_of(method: Method) -> QuantizationScheme:
    """The preset, or W4A16 with smaller groups."""
    scheme = preset_name_to_scheme(PRESETS.get(method, "W4A16"), ["Linear"])
    if method in GROUPS:
        assert scheme.weights is not None
        scheme.weights = scheme.weights.model_copy(update={"group_size": GROUPS[method]})
    return scheme


def calibrated(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points of ``weight`` by the extremes of each cell, as llm-compressor observes weights."""
    if args.strategy == "channel":
        cells = weight.unsqueeze(-2)
    elif args.strategy == "group":
        cells = weight.unflatten(-1, (-1, args.group_size))
    else:
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        cells = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(-2)
    return calculate_qparams(cells.amin(-1), cells.amax(-1), args)


def quantised(weight: torch.Tensor, method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``weight`` is stored as, and its scales."""
    args = scheme_of(method).weights
    assert args is not None
    scales, zeros = calibrated(weight, args)
    if args.strategy == "block":
        height, width = weight.shape
        weight = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        return quantize(weight, scales, zeros, args, dtype=torch.float8_e4m3fn)[:height, :width].contiguous(), scales
    if args.num_bits == 4:
        return pack_to_int32(quantize(weight, scales, zeros, args, dtype=torch.int8), 4), scales
    return quantize(weight, scales, zeros, args, dtype=torch.float8_e4m3fn), scales


def save_quantised(model: Any, method: Method, folder: Path, ignore: list[str], **options: Any) -> None:
    """Quantise a transformers ``model`` in place, and save it, with ``options`` of ``save_pretrained``."""
    scheme = scheme_of(method)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore))
    for module in model.modules():
        if is_module_quantized(module):
            module.weight_scale.data, _ = calibrated(module.weight.data, module.quantization_scheme.weights)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, **options)
    compressor.update_config(str(folder))


class _Expert(torch.nn.Module):
    """One expert of a stack, as linears."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = torch.nn.Parameter(weight.clone())
            self.add_module(name, linear)


def with_linear_experts(model: Any) -> Any:
    """``model`` with modules of linears in place of its stacks of experts, as llm-compressor makes them."""
    stacks = [name for name, module in model.named_modules() if hasattr(module, "gate_up_proj") and _is_stack(module)]
    assert stacks
    for name in stacks:
        held = model.get_submodule(name)
        made = (_Expert(*one) for one in zip(held.gate_up_proj.data, held.down_proj.data, strict=True))
        model.set_submodule(name, torch.nn.ModuleList(made))
    return model


def _is_stack(module: Any) -> bool:
    return isinstance(module.gate_up_proj, torch.nn.Parameter)
