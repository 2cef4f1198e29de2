"""Quantised models answer as transformers does with the weights that their codes stand for, at every size."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import make_mixture
from tests.unit.packers import PACKERS, compressed, mxfp4
from tests.unit.packing import Packer
from tests.unit.quantised_model import Quantised, quantise
from tests.unit.synthetic import make_config
from tests.unit.test_models import logits_of
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.metadata import read_metadata
from tpctl.cli.engine import say_static_scales
from tpctl.distributed import TPGroup
from tpctl.engine.runners.loading import load, run_bytes
from tpctl.errors import PartitionError, TpctlError, UnsupportedModelError
from tpctl.layers.linear import ReplicatedLinear
from tpctl.layers.weights.codes import CodesWeight
from tpctl.manifest.manifest import Manifest
from tpctl.models.loader import load_shard, refuse_orders
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig

LAYERS = ["linear_attention", "full_attention"]
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "moe_intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
"""Of which 144 and 80 are no whole number of groups of 32 and blocks of 128, and heads are smaller than those."""

LINEAR: dict[str, Any] = {"linear_key_head_dim": 16, "linear_value_head_dim": 8, "layer_types": LAYERS}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {**LINEAR, **EXPERTS, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    "qwen3_5_text": {**LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 12},
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
}
"""Which have few heads of few dimensions, so that borders are inside of blocks."""

SCALES = (".scales", ".weight_scale", ".weight_scale_inv")


def usual_size(made: Quantised) -> Quantised:
    """The same with weights near 0.15, by powers of two, which all scales can take exactly."""
    tensors, matrices = dict(made.tensors), dict(made.matrices)
    for module, matrix in made.matrices.items():
        power = round(torch.tensor(0.15 / matrix.std()).log2().item())
        matrices[module] = matrix * 2.0**power
        divisor, factor = f"{module}.weight_global_scale", f"{module}.weight_scale_2"
        if factor in tensors:
            tensors[factor] = tensors[factor] * 2.0**power
            continue
        if divisor in tensors:
            tensors[divisor] = tensors[divisor] * 2.0**-power
            continue
        (name,) = (module + suffix for suffix in SCALES if module + suffix in tensors)
        scale = tensors[name]
        if scale.dtype == torch.uint8:
            tensors[name] = (scale.int() + power).to(torch.uint8)
        elif scale.dtype == torch.float8_e8m0fnu:
            tensors[name] = (scale.view(torch.uint8).int() + power).to(torch.uint8).view(scale.dtype)
        else:
            tensors[name] = (scale.float() * 2.0**power).to(scale.dtype)
    modules = tuple(f"{module}." for module in made.matrices)
    rest = {name: one.float() for name, one in tensors.items() if not name.startswith(modules)}
    for name, one in rest.items():
        rest[name] = one * 0.15 if one.ndim > 1 else one * 0.3 + 0.5
    biases = {name: one * 0.25 for name, one in tensors.items() if name.endswith(".bias")}
    return replace(made, tensors={**tensors, **rest, **biases}, matrices=matrices)


def dense(made: Quantised, folder: Path) -> Any:
    """transformers' model with the numbers that the codes stand for."""
    import transformers

    config = {key: value for key, value in made.config.items() if key != "quantization_config"}
    if any(name.endswith(".bias") for name in made.tensors):
        config |= {"attention_bias": True, "mlp_bias": True}
    modules = tuple(f"{module}." for module in made.matrices)
    tensors: dict[str, Tensor] = {f"{name}.weight": torch.from_numpy(one) for name, one in made.matrices.items()}
    for name, one in made.tensors.items():
        if not name.startswith(modules) or name.endswith(".bias"):
            tensors[name] = one.float()
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def model_of(family: str, packer: Packer, **changes: Any) -> Quantised:
    sizes = {key: value for key, value in SIZES.items() if not key.startswith("moe") or "moe" in family}
    if family in RECURRENT:
        sizes |= {**RECURRENT[family], "num_hidden_layers": 2}
    elif "moe" in family:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    made = quantise(make_config(family, **{**sizes, **changes}), packer)
    if "moe" in family:  # which transformers has no biases for
        made = replace(made, tensors={name: one for name, one in made.tensors.items() if not name.endswith(".bias")})
    return usual_size(made)


FUSED = [("phi3", name) for name in ("fp8", "fp8 of other blocks", "ct fp8 in blocks")]
"""Of which q, k and v, and gate and up, begin inside of a block of one tensor."""


NETS = [*product(RECURRENT, ("fp8", "ct int4")), ("qwen3_5_moe_text", "ct nvfp4")]


@pytest.mark.daily(3)
@pytest.mark.parametrize(("family", "name"), [*product(("llama", "qwen3_moe"), PACKERS), *FUSED, *NETS])
def test_logits_equal_those_of_the_numbers(family: str, name: str, tmp_path: Path) -> None:
    made = model_of(family, PACKERS[name])
    made.save(tmp_path / "model")
    model = dense(made, tmp_path / "dense")
    prompts = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompts).logits
    ran = 0
    if "num_experts" not in made.config:
        cuttings = [(1, Cutting()), (2, Cutting()), (3, Cutting()), (4, Cutting(even=True))]
    else:
        cuttings = [(1, Cutting()), (3, Cutting()), (4, Cutting(2))]
    for number, (tp_size, cutting) in enumerate(cuttings):
        try:
            shard_checkpoint(tmp_path / "model", tmp_path / f"shards-{number}", tp_size, cutting=cutting)
        except PartitionError as error:
            assert tp_size > 1 and "inside of a word" in str(error)
            continue
        found = logits_of(tmp_path / f"shards-{number}", tp_size, prompts.tolist())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize(
    ("family", "name", "tp_size", "changes"),
    [
        ("llama", "awq", 1, {"intermediate_size": 132}),  # words of outputs that end before they are full
        ("llama", "awq", 3, {"intermediate_size": 132}),
        ("llama", "gptq", 5, {"intermediate_size": 64}),  # one word of inputs on a rank
        (
            "qwen2_moe",
            "ct fp8 in blocks",
            2,
            {"shared_expert_intermediate_size": 48, "qkv_bias": False},
        ),  # the shared gate
    ],
)
def test_words_that_are_few_or_not_full(
    family: str, name: str, tp_size: int, changes: dict[str, int], tmp_path: Path
) -> None:
    made = model_of(family, PACKERS[name], **changes)
    made.save(tmp_path / "model")
    model = dense(made, tmp_path / "dense")
    prompts = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompts).logits
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)
    torch.testing.assert_close(logits_of(tmp_path / "shards", tp_size, prompts.tolist()), expected, rtol=0, atol=1e-4)


def packed_experts(outputs: int, inputs: int, count: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """MXFP4 of a stack of random experts, and what it stands for, [E, out, in]."""
    each = [mxfp4(outputs, inputs, rng) for _ in range(count)]
    blocks = torch.stack([tensors["_blocks"] for tensors, _ in each])
    scales = torch.stack([tensors["_scales"] for tensors, _ in each]) - 6
    return {"_blocks": blocks, "_scales": scales}, torch.stack([matrix for _, matrix in each]).float() * 2.0**-6


@pytest.mark.parametrize(
    ("family", "tp_size", "groups"),
    [*(("gpt_oss", *one) for one in [(1, 1), (2, 1), (3, 1), (4, 2)]), ("mixtral", 2, 1), ("qwen3_moe", 4, 2)],
)
def test_stacked_experts_in_mxfp4(family: str, tp_size: int, groups: int, tmp_path: Path) -> None:
    """Of gpt-oss, and of families whose published checkpoints do not stack them: three blocks of 32 inputs."""
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    sizes = {"hidden_size": 64, width: 96, "num_hidden_layers": 2}
    model = make_mixture(family, tmp_path / "model", stacked=True, **sizes)
    state, rng = load_file(tmp_path / "model" / "model.safetensors"), torch.Generator().manual_seed(2)
    for number, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj") if hasattr(layer.mlp, "experts") else ():
            stack = getattr(layer.mlp.experts, name)
            outputs, inputs = (64, 96) if name == "down_proj" else (192, 64)
            made, matrix = packed_experts(outputs, inputs, len(stack), rng)
            stack.data.copy_(matrix.mT if family == "gpt_oss" else matrix)
            whole = f"model.layers.{number}.mlp.experts.{name}"
            del state[whole]
            state |= {whole + suffix: tensor for suffix, tensor in made.items()}
    save_file(state, tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    prompts = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompts).logits
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size, cutting=Cutting(groups))
    torch.testing.assert_close(logits_of(tmp_path / "shards", tp_size, prompts.tolist()), expected, rtol=0, atol=1e-4)


def test_an_order_that_names_no_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards that were cut before such a checkpoint was refused."""
    monkeypatch.setattr("tpctl.sharding.cutting.shard.check_constants", lambda *given: None)
    made = model_of("llama", PACKERS["gptq in order of activation"])
    name = "model.layers.1.self_attn.o_proj.g_idx"
    for wrong, said in ((7, "group 7"), (-1, "group -1")):
        order = made.tensors[name].clone()
        order[5] = wrong
        replace(made, tensors={**made.tensors, name: order}).save(tmp_path / f"model{wrong}")
        with pytest.raises(TpctlError, match=rf"o_proj\.g_idx puts an input into {said}, but .* for groups 0 to 2"):
            shard_checkpoint(tmp_path / f"model{wrong}", tmp_path / f"shards{wrong}", 1)
            logits_of(tmp_path / f"shards{wrong}", 1, [[3, 4, 5]])


COUNTED = {
    "ct int4": PACKERS["ct int4"],
    "ct int4 with zeros": PACKERS["ct int4 with zeros"],
    "ct int2": compressed("pack-quantized", num_bits=2, strategy="group", group_size=32, symmetric=False),
    "gptq of 8 bits": PACKERS["gptq of 8 bits"],
    "awq": PACKERS["awq"],
    "fp8": PACKERS["fp8"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packer", COUNTED)
def test_weights_are_counted_as_they_run(
    packer: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are loaded, and in a plan: floats in the dtype, codes and scales as stored, but for what grows."""
    made = quantise(make_config(hidden_size=128, intermediate_size=256, head_dim=32), COUNTED[packer])
    source, out = made.save(tmp_path / "model"), tmp_path / "out"
    shard_checkpoint(source, out, 1)
    held: list[int] = []  # which a GPU is asked for
    monkeypatch.setattr("tpctl.engine.runners.loading._share", lambda settings, group, nbytes: held.append(nbytes))
    loaded, shard = load(EngineConfig(out, 1, dtype=dtype), TPGroup()), Manifest.load(out).shard(0)
    tensors = shard.tensors
    linears = [one for one in loaded.model.modules() if isinstance(one, ReplicatedLinear) and not one.held.is_dense]
    kept = {one.held.name + kind for one in linears for kind in one.held.kept}
    floats = sum(one.nbytes for name, one in loaded.model.named_parameters() if name not in kept)
    codes = 0
    for linear in linears:
        assert isinstance(linear.matrix, CodesWeight)
        found = linear.matrix.codes
        codes += found.nbytes - (0 if found.rows is None else found.rows.nbytes)  # which the shard does not hold
    unread = sum(4 * tensors[name].shape[0] for linear in linears for name in linear.held.unread)
    counted = run_bytes(build_plan(loaded.config, 1), loaded.config.blueprint, tensors, loaded.dtype)
    assert counted - unread == codes + floats
    assert held == [max(counted, shard.nbytes)]
    if dtype == "bfloat16":
        (rank,) = plan_model(read_metadata(str(source)), Budget(), tp_size=1).ranks
        assert rank.weight_bytes + rank.growth_bytes == counted
        assert (rank.growth_bytes > 0) is (packer not in ("ct int4", "fp8"))


@pytest.mark.parametrize("alike", [True, False])
def test_experts_in_two_orders_are_refused_on_gpus_before_they_are_read(alike: bool, tmp_path: Path) -> None:
    experts = {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "head_dim": 32,
    }
    made = quantise(make_config("qwen3_moe", **experts), PACKERS["gptq in order of activation"])
    if alike:
        pairs = [(one, one.replace("up_proj", "gate_proj")) for one in made.tensors if ".up_proj.g_idx" in one]
        made.tensors.update({one: made.tensors[other].clone() for one, other in pairs})
    out = tmp_path / "out"
    shard_checkpoint(made.save(tmp_path / "model"), out, 2)
    model = load(EngineConfig(out, 2), TPGroup(0, 2)).model
    files = [out / name for name in Manifest.load(out).rank_files(0)]
    if alike:
        refuse_orders(model.held, files)
        return
    said = r"^model\.layers\.0\.mlp\.experts\.w13_g_idx has the inputs of experts' gate and up in different groups,"
    with pytest.raises(UnsupportedModelError, match=said):
        refuse_orders(model.held, files)
    with pytest.raises(UnsupportedModelError, match=said):  # before anything is read, and so without a GPU
        load_shard(model, files, torch.device("cuda"))


@pytest.mark.parametrize(("name", "told"), [("fp8 by tensor", True), ("fp8", False), ("modelopt nvfp4", False)])
def test_static_scales_of_inputs_are_told_of(
    name: str, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where inputs are rounded, and the checkpoint says by what."""
    folder = model_of("llama", PACKERS[name], num_hidden_layers=1).save(tmp_path / "model")
    say_static_scales(EngineConfig(folder, 1))
    assert ("static scales of activations are not used" in capsys.readouterr().err) == told
