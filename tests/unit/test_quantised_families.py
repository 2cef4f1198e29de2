"""Every family answers in every quantised format as transformers does with the numbers that the codes stand for.

A run takes each family and each format once, others beside each other every day; ``--whole-grid`` takes all pairs.
``test_quantised_runs.py`` has borders at more sizes, and gpt-oss' own MXFP4.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import FAMILIES, MIXTURES, make_checkpoint, make_mixture
from tests.unit.packers import PACKERS
from tests.unit.quantised_model import Quantised, quantise
from tests.unit.test_families_formats import FEW, without
from tests.unit.test_models import logits_of
from tests.unit.test_quantised_runs import usual_size
from tpctl.errors import PartitionError
from tpctl.sharding.cutting.shard import shard_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 96}
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 64}
NET: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MIXED = ["sliding_attention", "full_attention"]
NAMES: dict[str, dict[str, Any]] = {
    "llama3": {},
    "mistral": {},
    "ministral3-window": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"head_dim": None},
    "gemma2": {},
    "gemma3": {"layer_types": MIXED},
    "gemma4-text": {"global_head_dim": 32, "layer_types": MIXED},
    "gemma4-text-moe": {"global_head_dim": 32, "layer_types": MIXED, "moe_intermediate_size": 96},
    "gemma4-unified-text": {"global_head_dim": 32, "layer_types": MIXED},
    "gemma4-text-edge": {"num_hidden_layers": 6, "global_head_dim": 32, "hidden_size_per_layer_input": 32},
    "olmo2": {"head_dim": None},
    "olmo3": {"head_dim": None, "layer_types": MIXED},
    "granite": {"head_dim": None},
    "glm4": {},
    "smollm3": {},
    "seed-oss": {},
    "cohere2": {"layer_types": MIXED},
    "mixtral": {},
    "qwen2_moe": SHARED,
    "qwen3_moe": EXPERTS,
    "glm4_moe": EXPERTS,
    "minimax_m2": {},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "gpt_oss": {},
    "qwen3_next": {**SHARED, **NET},
    "qwen3_5_text": NET,
    "qwen3_5_moe_text": {**SHARED, **NET},
}
"""Families, and what they have of sizes that every format takes."""
FLOATS = {"gpt_oss": ("mlp.experts",)}
"""What is left as floats beside ``FEW``: stacks whose only other form is MXFP4."""


def expected_of(model: Any, prompts: Tensor) -> list[Tensor]:
    """Transformers' logits in float32 and in float64: a gated delta net can make more of float32's rounding, theirs or
    ours, than is allowed here, but nothing that is wrong comes close to either."""
    with torch.no_grad():
        logits = [model(prompts).logits]
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = "eager"  # products that know float64
        logits.append(model.double()(prompts).logits.float())
    return logits


def made(name: str, packing: str, folder: Path) -> tuple[Quantised, Any]:
    """A checkpoint, and transformers' model with the numbers that its codes stand for."""
    import transformers

    sizes = {key: one for key, one in {**SIZES, **NAMES[name]}.items() if one is not None}
    (make_checkpoint if name in FAMILIES else make_mixture)(name, folder / "floats", **sizes)
    raw = json.loads((folder / "floats" / "config.json").read_text())
    floats = load_file(folder / "floats" / "model.safetensors")
    left = FLOATS.get(name, ())
    packer = without(PACKERS[packing], (*FEW, *left))
    if left and packer.config["quant_method"] == "fp8":
        packer = replace(packer, config={**packer.config, "modules_to_not_convert": list(left)})
    packed = usual_size(quantise(raw, packer))
    modules = tuple(f"{module}." for module in packed.matrices)
    tensors = {one: x for one, x in packed.tensors.items() if one.startswith(modules) and not one.endswith(".bias")}
    dense = {f"{module}.weight": torch.from_numpy(one).contiguous() for module, one in packed.matrices.items()}
    if not dense.keys() <= floats.keys():
        dense = stacked(dense)
    assert dense.keys() <= floats.keys() and tensors
    for one, x in floats.items():
        if one not in dense:
            tensors[one] = dense[one] = x
    save_file(dense, folder / "floats" / "model.safetensors", {"format": "pt"})
    kind = getattr(transformers, raw["architectures"][0])
    model = kind.from_pretrained(folder / "floats", dtype=torch.float32, attn_implementation="eager").eval()
    return replace(packed, tensors=tensors), model


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with experts that were one by one as transformers holds Gemma 4's: gates and ups of all, and downs."""
    found: dict[str, Any] = {}
    for name, one in tensors.items():
        whole, expert, rest = name.partition(".experts.")
        if not expert:
            found[name] = one
            continue
        kind = rest.split(".")[1]
        stack = f"{whole}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
        found.setdefault(stack, {}).setdefault(int(rest.split(".")[0]), {})[kind] = one
    order = ("gate_proj", "up_proj", "down_proj")
    return {
        name: one
        if isinstance(one, Tensor)
        else torch.stack([torch.cat([one[at][kind] for kind in order if kind in one[at]]) for at in sorted(one)])
        for name, one in found.items()
    }


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_the_numbers(name: str, packing: str, tp_size: int, tmp_path: Path) -> None:
    checkpoint, model = made(name, packing, tmp_path)
    checkpoint.save(tmp_path / "model")
    prompts = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = expected_of(model, prompts)
    try:
        shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)
    except PartitionError as error:
        assert tp_size > 1 and any(why in str(error) for why in ("inside of a word", "does not fit gated delta net"))
        tp_size = 1
        shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)
    found = logits_of(tmp_path / "shards", tp_size, prompts.tolist())
    off = torch.stack([(found - one).abs() for one in expected]).amin(0)
    assert off.max() <= 1e-4  # NaN is not


def test_every_family_has_its_turn() -> None:
    """Of those that tests hold against transformers."""
    kinds = {FAMILIES[name][0] for name in FAMILIES} | {kind for kind, _ in MIXTURES.values()}
    assert {(FAMILIES.get(name) or MIXTURES[name])[0] for name in NAMES} == kinds
