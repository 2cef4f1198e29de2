"""The demo model's weights in other forms: as mixtures of experts that compute the same, and rounded into formats.

    python -m tests.distributed.real_forms FOLDER [--forms awq gptq int4 int8 nvfp4 mxfp4]

writes checkpoints in formats into ``FOLDER``, all by default, with the tokenizer beside each: for ``tpctl bench
quality`` (docs/quality.md). Each value is rounded to the nearest; none of them is chosen by what a model answers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.packers import AWQ_ORDER, E2M1, awq, compressed, gptq
from tests.unit.packing import expanded, words
from tpctl.arch.families import FAMILIES
from tpctl.checkpoint.sources import resolve

Tensors = dict[str, Tensor]
Rounded = tuple[Tensors, Tensor]
"""The tensors of a linear by suffix, and the matrix [N, K] that they mean, in float32."""
WIDTH = 1536
"""Rows of the demo model's MLPs."""


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """A checkpoint's config and tensors."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shallow(source: Path, folder: Path, layers: int) -> Path:
    """The first ``layers`` of ``source``, and what is beside them."""
    config, tensors = read(source)
    held = {
        name: one
        for name, one in tensors.items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
    }
    return write(folder, {**config, "num_hidden_layers": layers}, held)


def projections(gate: Tensor, up: Tensor, down: Tensor, where: str, names: tuple[str, str, str]) -> Tensors:
    return {f"{where}.{name}.weight": one for name, one in zip(names, (gate, up, down), strict=True)}


MIXTRAL, OWN = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")


def copies(gate: Tensor, up: Tensor, down: Tensor, router: Tensor) -> Tensors:
    """Mixtral of three experts, each the whole MLP: weights of any two add up to 1."""
    where = "block_sparse_moe"
    found = {f"{where}.gate.weight": router[:3]}
    for expert in range(3):
        found |= projections(gate, up, down, f"{where}.experts.{expert}", MIXTRAL)
    return found


def slices(gate: Tensor, up: Tensor, down: Tensor, router: Tensor) -> Tensors:
    """Mixtral of eight experts of 192 rows, all of them chosen by the same weight, an eighth."""
    where, rows = "block_sparse_moe", WIDTH // 8
    found = {f"{where}.gate.weight": torch.zeros_like(router[:8])}
    for expert in range(8):
        own = slice(expert * rows, (expert + 1) * rows)
        found |= projections(gate[own], up[own], down[:, own] * 8, f"{where}.experts.{expert}", MIXTRAL)
    return found


def shared(gate: Tensor, up: Tensor, down: Tensor, router: Tensor) -> Tensors:
    """Qwen2-MoE whose four experts have half of the rows, and the shared one, by a gate of one half, the others."""
    half, rows = WIDTH // 2, WIDTH // 8
    found = {"mlp.gate.weight": torch.zeros_like(router[:4]), "mlp.shared_expert_gate.weight": torch.zeros(1, 576)}
    found["mlp.shared_expert_gate.weight"] = found["mlp.shared_expert_gate.weight"].to(gate.dtype)
    for expert in range(4):
        own = slice(expert * rows, (expert + 1) * rows)
        found |= projections(gate[own], up[own], down[:, own] * 4, f"mlp.experts.{expert}", OWN)
    return found | projections(gate[half:], up[half:], down[:, half:] * 2, "mlp.shared_expert", OWN)


def grouped(gate: Tensor, up: Tensor, down: Tensor, router: Tensor) -> Tensors:
    """GLM-4.5 of four equal experts in two groups, which have half of the rows; a shared one has the others."""
    half = WIDTH // 2
    found = {"mlp.gate.weight": router[:4], "mlp.gate.e_score_correction_bias": router[4, :4].float()}
    for expert in range(4):
        found |= projections(gate[:half], up[:half], down[:, :half], f"mlp.experts.{expert}", OWN)
    return found | projections(gate[half:], up[half:], down[:, half:], "mlp.shared_experts", OWN)


Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensors]
MIXTURES: dict[str, tuple[str, Form, dict[str, Any]]] = {
    "copies": ("mixtral", copies, {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
    "slices": (
        "mixtral",
        slices,
        {"num_local_experts": 8, "num_experts_per_tok": 8, "sliding_window": None, "intermediate_size": WIDTH // 8},
    ),
    "shared": (
        "qwen2_moe",
        shared,
        {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": WIDTH // 8,
            "shared_expert_intermediate_size": WIDTH // 2,
            "qkv_bias": False,
        },
    ),
    "grouped": (
        "glm4_moe",
        grouped,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": WIDTH // 2,
            "first_k_dense_replace": 1,
            "partial_rotary_factor": 1.0,
            "head_dim": 64,
        },
    ),
}


def mixture(name: str, source: Path, folder: Path) -> Path:
    """``source`` as ``MIXTURES[name]``."""
    config, tensors = read(source)
    family, form, fields = MIXTURES[name]
    rng = torch.Generator().manual_seed(5)
    for layer in range(fields.get("first_k_dense_replace", 0), config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        gate, up, down = (tensors.pop(f"{at}mlp.{one}.weight") for one in OWN)
        router = torch.randn(8, config["hidden_size"], generator=rng).to(gate.dtype)
        tensors |= {at + key: one.clone() for key, one in form(gate, up, down, router).items()}
    config = {**config, "model_type": family, "architectures": [FAMILIES[family].architecture], **fields}
    return write(folder, config, tensors)


def of_groups(weight: Tensor, groups: Tensor, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` [K, N] in 4 bits with a zero point of at least ``least``, by the extremes of each of ``groups`` [K]:
    values [K, N], zeros [G, N] and scales [G, N]."""
    count = int(groups.max()) + 1
    low, high = (
        torch.stack([edge(weight[groups == one], 0) for one in range(count)]) for edge in (torch.amin, torch.amax)
    )
    scales = ((high.clamp(min=0) - low.clamp(max=0)) / 15).clamp(min=1e-6).half()
    zeros = (-low.clamp(max=0) / scales.float()).round().clamp(least, 15).long()
    values = (weight / scales.float()[groups]).round() + zeros[groups]
    return values.clamp(0, 15).long(), zeros, scales


def as_awq(weight: Tensor) -> Rounded:
    groups = torch.arange(weight.shape[1]) // 64
    values, zeros, scales = of_groups(weight.T, groups, 0)
    tensors = {
        "qweight": words(values, 4, 1, AWQ_ORDER),
        "qzeros": words(zeros, 4, 1, AWQ_ORDER),
        "scales": scales,
    }
    return tensors, ((values - zeros[groups]) * scales.float()[groups]).T


def as_gptq(weight: Tensor) -> Rounded:
    """With inputs of groups in another order; the last group of 576 inputs is half a one."""
    inputs = weight.shape[1]
    groups = (torch.arange(inputs) // 128)[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    values, zeros, scales = of_groups(weight.T, groups, 1)
    tensors = {
        "qweight": words(values, 4, 0),
        "qzeros": words(zeros - 1, 4, 1),
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }
    return tensors, ((values - zeros[groups]) * scales.float()[groups]).T


def as_int4(weight: Tensor) -> Rounded:
    rows, inputs = weight.shape
    scales = (weight.unflatten(1, (-1, 64)).abs().amax(-1) / 7.5).bfloat16()
    spread = expanded(scales, 1, 64, rows, inputs)
    values = (weight / spread).round().clamp(-8, 7)
    packed = words(values + 8, 4, 1)
    return {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, inputs]),
    }, values * spread


def as_int8(weight: Tensor) -> Rounded:
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (weight / scales.float()).round().clamp(-128, 127)
    tensors = {"weight": values.to(torch.int8), "weight_scale": scales, "input_scale": torch.ones(1)}
    return tensors, values * scales.float()


def to_e2m1(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of 4 bits, two a byte, and what they stand for."""
    table = torch.from_numpy(E2M1)
    codes = (numbers.unsqueeze(-1) - table).abs().argmin(-1)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), table[codes]


def as_nvfp4(weight: Tensor) -> Rounded:
    rows, inputs = weight.shape
    factor = 448 * 6 / weight.abs().max().reshape(1)
    scales = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * factor).clamp(min=2.0**-6).to(torch.float8_e4m3fn)
    spread = expanded(scales, 1, 16, rows, inputs) / factor
    packed, numbers = to_e2m1(weight / spread)
    others = {"weight_global_scale": factor, "input_global_scale": torch.ones(1)}
    return {"weight_packed": packed, "weight_scale": scales, **others}, numbers * spread


def of_fp8(tensors: Tensors, module: str) -> Tensor:
    """The matrix of a linear in FP8, by row or in blocks of 128."""
    weight, scale = tensors[f"{module}.weight"].float(), tensors[f"{module}.weight_scale"].float()
    return weight * (scale if scale.shape[1] == 1 else expanded(scale, 128, 128, *weight.shape))


FORMATS: dict[str, tuple[Callable[[Tensor], Rounded], dict[str, Any]]] = {
    "awq": (as_awq, awq(64).config),
    "gptq": (as_gptq, gptq(4, 128, ordered=True).config),
    "int4": (as_int4, compressed("pack-quantized", num_bits=4, strategy="group", group_size=64).config),
    "int8": (as_int8, compressed("int-quantized", strategy="channel").config),
    "nvfp4": (
        as_nvfp4,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16).config,
    ),
}


def linears(tensors: Tensors) -> Iterator[str]:
    """The modules that formats quantise."""
    return (name.removesuffix(".weight") for name in sorted(tensors) if name.endswith("_proj.weight"))


def rounded(name: str, source: Path, folder: Path) -> Tensors:
    """Write ``source`` in ``FORMATS[name]``; the matrices that its linears now mean, by tensor."""
    config, tensors = read(source)
    pack, scheme = FORMATS[name]
    matrices: Tensors = {}
    for module in list(linears(tensors)):
        made, matrix = pack(tensors.pop(f"{module}.weight").float())
        tensors |= {f"{module}.{kind}": one for kind, one in made.items()}
        matrices[f"{module}.weight"] = matrix
    write(folder, {**config, "quantization_config": scheme}, tensors)
    return matrices


def in_blocks_of_four_bits(source: Path, folder: Path) -> Tensors:
    """Write ``source`` as ``slices``, whose experts are stacked and in MXFP4; what its MLPs then mean."""
    config, tensors = read(source)
    _, _, fields = MIXTURES["slices"]
    rows, matrices = WIDTH // 8, dict[str, Tensor]()
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        gate, up, down = (tensors.pop(f"{at}mlp.{one}.weight").float() for one in OWN)
        stacks = {
            "gate_up_proj": torch.cat((gate.unflatten(0, (8, rows)), up.unflatten(0, (8, rows))), dim=1),
            "down_proj": down.unflatten(1, (8, rows)).movedim(1, 0) * 8,
        }
        numbers = {}
        for kind, stack in stacks.items():
            blocks = stack.unflatten(-1, (-1, 32))
            powers = blocks.abs().amax(-1).log2().floor().clamp(-100, 100) - 2
            packed, found = to_e2m1(blocks / 2 ** powers.unsqueeze(-1))
            tensors[f"{at}mlp.experts.{kind}_blocks"] = packed
            tensors[f"{at}mlp.experts.{kind}_scales"] = (powers + 127).to(torch.uint8)
            numbers[kind] = (found * 2 ** powers.unsqueeze(-1)).flatten(-2)
        gates, ups = numbers["gate_up_proj"].split(rows, dim=1)
        matrices |= projections(
            gates.flatten(0, 1), ups.flatten(0, 1), numbers["down_proj"].movedim(0, 1).flatten(1) / 8, f"{at}mlp", OWN
        )
        tensors[f"{at}mlp.gate.weight"] = torch.zeros(8, config["hidden_size"], dtype=torch.bfloat16)
    config = {**config, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **fields}
    write(folder, {**config, "quantization_config": {"quant_method": "mxfp4"}}, tensors)
    return matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*FORMATS, "mxfp4"]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--forms", nargs="+", default=known, choices=known)
    options = parser.parse_args()
    source = resolve("demo").folder
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.forms:
        out = options.folder / name
        in_blocks_of_four_bits(source, out) if name == "mxfp4" else rounded(name, source, out)
        for file in source.iterdir():
            if file.is_file() and "safetensors" not in file.name and file.name != "config.json":
                shutil.copy(file, out)
        print(out, flush=True)


if __name__ == "__main__":
    main()
