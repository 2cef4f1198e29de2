"""A quantised checkpoint folder: the files that compressed-tensors would have saved, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_checkpoint as make_tiny
from tests.tiny import make_mixture
from tests.unit.quantising_folders import HIDDEN, LAYER, MEASURE, MLP, dense, quantise, write
from tests.unit.synthetic import folder_bytes
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.errors import CheckpointError, TpctlError, UnsupportedModelError
from tpctl.quantizing import writer
from tpctl.quantizing.linears import ignored, linears, quantised_shapes
from tpctl.quantizing.schemes import SCHEMES, Method


def mixture(layers: int = 11) -> list[TensorSpec]:
    """The tensors of a small mixture of experts, with a shared one."""
    specs = [one for one in dense(layers) if ".mlp." not in one.name]
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        owners = [*(f"{mlp}.experts.{expert}" for expert in range(3)), f"{mlp}.shared_expert"]
        specs += [TensorSpec(f"{mlp}.gate.weight", "BF16", (3, HIDDEN))]
        specs += [TensorSpec(f"{mlp}.shared_expert_gate.weight", "BF16", (1, HIDDEN))]
        specs += [TensorSpec(f"{o}.{name}.weight", "BF16", shape) for o in owners for name, shape in MLP.items()]
    return specs


@pytest.mark.daily(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("family", ["llama-biases", "phi3", "gemma3", "smollm2"])
def test_files_are_those_that_llm_compressor_saves(tmp_path: Path, family: str, method: Method, dtype: str) -> None:
    """Weights and config byte for byte; sizes that no block divides where the method bears them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from tests.unit.quantising import save_quantised

    source, theirs = tmp_path / "source", tmp_path / "theirs"
    hidden = 1152 if family == "smollm2" else 128
    model = make_tiny(
        family,
        source,
        hidden_size=hidden,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"] if family == "gemma3" else None,
        intermediate_size=256 if SCHEMES[method].kind == "int" else 200,
    )
    model.to(getattr(torch, dtype)).save_pretrained(source)
    quantise(source, tmp_path / "ours", method)
    save_quantised(model, method, theirs, ["lm_head"])
    ours = folder_bytes(tmp_path / "ours")
    assert ours.keys() == folder_bytes(theirs).keys()
    assert ours["model.safetensors"] == (theirs / "model.safetensors").read_bytes()
    assert json.loads(ours["config.json"]) == json.loads((theirs / "config.json").read_text())
    assert ours["generation_config.json"] == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize("family", ["llama3", "qwen3_5_text", "deepseek_v3"])
@pytest.mark.parametrize("method", Method)
def test_transformers_loads_it(tmp_path: Path, method: Method, family: str) -> None:
    """And computes with the weights that are stored."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    import transformers

    source = tmp_path / "source"
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
    if family == "llama3":
        make_tiny(family, source, num_hidden_layers=2, **sizes)
    else:  # all linears of 128 inputs, or a multiple
        heads = {"num_attention_heads": 4, "qk_nope_head_dim": 28, "v_head_dim": 32, "q_lora_rank": 128}
        latent: dict[str, Any] = {**heads, "num_key_value_heads": 4, "kv_lora_rank": 128, "first_k_dense_replace": 3}
        own = latent if family == "deepseek_v3" else {"head_dim": 64}
        make_mixture(family, source, **sizes, **own)
    report = quantise(source, tmp_path / "ours", method)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        loaded(torch.tensor([[5, 9, 101, 17]]))  # which decompresses the weights
    for name, module in wanted.named_modules():
        if isinstance(module, torch.nn.Linear):
            difference = loaded.get_submodule(name).weight - module.weight
            loss = next((one for one in report.tensors if one.name == f"{name}.weight"), None)
            largest = 0.0 if loss is None else loss.largest
            assert float(difference.detach().abs().max()) == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("files", [1, 3])
def test_shapes_are_known_from_headers_alone(tmp_path: Path, method: Method, files: int) -> None:
    for index, specs in enumerate((dense(dtype="F16"), mixture())):
        source = write(tmp_path / f"source{index}", specs, files)
        report = quantise(source, tmp_path / "out", method)
        made = CheckpointFolder.open(tmp_path / "out")
        assert {name: (info.dtype, info.shape) for name, (_, info) in made.tensors.items()} == quantised_shapes(
            {one.name: one for one in specs}, method
        )
        assert report.bytes_before == sum(one.nbytes for one in specs)
        assert report.bytes_after == sum(info.nbytes for _, info in made.tensors.values())
        assert [file.name for file in made.files] == [file.name for file in CheckpointFolder.open(source).files]
        if made.index is not None:
            metadata = json.loads(made.index)["metadata"]
            assert metadata == {"total_size": report.bytes_after, "note": "kept"}
        for name, (file, info) in CheckpointFolder.open(source).tensors.items():
            if name in made.tensors and info.dtype == made.tensors[name][1].dtype:
                there, same = made.tensors[name]
                assert there.path.read_bytes()[same.start : same.stop] == file.path.read_bytes()[info.start : info.stop]


def test_what_is_quantised_and_what_is_ignored() -> None:
    tensors = {one.name: one for one in mixture()}
    chosen = linears(tensors, Method.FP8)
    assert len(chosen) == 11 * (4 + 4 * 3)
    assert not [name for name in chosen if "gate.weight" in name or "norm" in name or "embed" in name]
    gates = [f"model.layers.{i}.mlp.{gate}" for i in range(11) for gate in ("gate", "shared_expert_gate")]
    assert ignored(tensors) == [*gates, "lm_head"]
    tied = {name: one for name, one in tensors.items() if name != "lm_head.weight"}
    assert ignored(tied)[-1] == "lm_head"
    tower = TensorSpec("vision_tower.layers.0.self_attn.q_proj.weight", "BF16", (8, 8))
    assert ignored({**tensors, tower.name: tower})[0] == tower.name.removesuffix(".weight")
    assert tower.name not in linears({**tensors, tower.name: tower}, Method.FP8)


def test_gated_delta_nets_stay_and_latent_attention_does_not() -> None:
    layer = "model.language_model.layers.2."
    kept = [f"{layer}linear_attn.{name}" for name in ("conv1d", "in_proj_ba", "in_proj_qkvz", "out_proj")]
    attention = [f"{layer}self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (256, 128) for name in (*kept[1:], *attention)}
    shapes |= {f"{kept[0]}.weight": (256, 1, 4), f"{layer}linear_attn.A_log": (8,)}
    tensors = {name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()}
    assert list(linears(tensors, Method.FP8)) == [f"{name}.weight" for name in attention]
    assert ignored(tensors) == [*kept, "lm_head"]


def test_a_mixtrals_experts_are_linears_too() -> None:
    names = [f"model.layers.1.block_sparse_moe.experts.7.w{index}.weight" for index in (1, 2, 3)]
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    tensors = {name: TensorSpec(name, "BF16", (256, 128)) for name in (*names, gate)}
    assert list(linears(tensors, Method.INT4)) == names
    assert ignored(tensors) == ["model.layers.1.block_sparse_moe.gate", "lm_head"]


@pytest.mark.parametrize(
    ("method", "extra", "error", "said"),
    [
        (
            Method.INT4,
            ("mlp.up_proj.weight", "BF16", (8, 200)),
            CheckpointError,
            "200 columns, which groups of 128 do not divide; use --quantize fp8, which has no groups",
        ),
        (
            Method.INT4,
            ("mlp.up_proj.weight", "BF16", (8, 64)),
            CheckpointError,
            "64 columns, which groups of 128 do not divide; use --quantize int4-g64, whose groups are of 64",
        ),
        (
            Method.INT4_G64,
            ("mlp.up_proj.weight", "BF16", (8, 96)),
            CheckpointError,
            "96 columns, which groups of 64 do not divide; use --quantize int4-g32, whose groups are of 32",
        ),
        (Method.FP8, ("mlp.up_proj.weight", "F64", (8, 128)), CheckpointError, r"is F64; --quantize fp8 takes BF16"),
        (
            Method.FP8,
            ("mlp.up_proj.weight", "F8_E4M3", (8, 128)),
            UnsupportedModelError,
            "quantised already .*up_proj.weight is F8",
        ),
        (
            Method.FP8,
            ("mlp.up_proj.weight_scale", "F32", (8, 1)),
            UnsupportedModelError,
            r"already \(.* is F32|already \(it holds",
        ),
        (Method.FP8, ("mlp.up_proj.qweight", "I32", (8, 16)), UnsupportedModelError, "quantised already"),
        (Method.FP8, ("mlp.up_proj.weight", "BF16", (8,)), CheckpointError, r"the shape \[8\], but a linear's weight"),
        (Method.FP8, ("mlp.up_proj.weight", "BF16", (0, 8)), CheckpointError, r"the shape \[0, 8\]"),
        (
            Method.FP8,
            ("mlp.experts.gate_up_proj", "BF16", (3, 8, 8)),
            CheckpointError,
            "gate_up_proj .* is no linear that",
        ),
        (Method.FP8, ("mlp.mixer.weight", "BF16", (8, 8)), CheckpointError, "mixer.weight .* is no linear that"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(
    tmp_path: Path, method: Method, extra: tuple[str, str, tuple[int, ...]], error: type[TpctlError], said: str
) -> None:
    name, dtype, shape = extra
    kept = [one for one in dense() if one.name != LAYER + name]
    source = write(tmp_path / "source", [*kept, TensorSpec(LAYER + name, dtype, shape)])
    with pytest.raises(error, match=said):
        quantise(source, tmp_path / "out", method)
    assert list((tmp_path / "out").iterdir()) == []


def test_groups_that_divide_every_weight_are_advised() -> None:
    """Not those that divide the first weight alone, which the next run would refuse."""
    columns = {"mlp.up_proj": 64, "mlp.down_proj": 96}
    chosen = {f"{LAYER}{name}.weight": TensorSpec(name, "BF16", (8, width)) for name, width in columns.items()}
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight has 64 columns, .* 128 do not .*; use --quantize int4-g32"
    ):
        linears(chosen, Method.INT4)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"format": "pack-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_config_that_tells_of_quantised_weights_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    source = write(tmp_path / "source", dense(), config=config)
    with pytest.raises(
        UnsupportedModelError, match=r"^the model is quantised already \(\w+ in its config.json\); leave out --quan"
    ):
        quantise(source, tmp_path / "out", Method.FP8)


def test_a_checkpoint_without_layers_is_refused() -> None:
    tensors = {"model.norm.weight": TensorSpec("model.norm.weight", "BF16", (8,))}
    with pytest.raises(CheckpointError, match="no linear of a decoder layer"):
        linears(tensors, Method.FP8)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_not_a_number_is_refused_by_name(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "source", dense())
    file, info = CheckpointFolder.open(source).tensors[name]
    data = bytearray(file.path.read_bytes())
    data[info.stop - 2 : info.stop] = b"\xc0\x7f"
    file.path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{name} holds NaN or infinity"):
        quantise(source, tmp_path / "out", Method.FP8_BLOCK)


@pytest.mark.parametrize("method", Method)
def test_bands_make_no_difference(tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither their height nor, of blocks, their width: whole rows are not always read at once."""
    source = write(tmp_path / "source", dense())
    quantise(source, tmp_path / "whole", method)
    monkeypatch.setattr(writer, "_BAND", 1)
    quantise(source, tmp_path / "bands", method)
    assert folder_bytes(tmp_path / "bands") == folder_bytes(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak so")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Of a matrix of 134 MB, wide enough that 128 of its rows are more than a band."""
    wide = TensorSpec(LAYER + "mlp.down_proj.weight", "BF16", (512, 1 << 17))
    header = build_header([wide])
    (tmp_path / "source").mkdir()
    with (tmp_path / "source" / "model.safetensors").open("wb") as file:
        file.write(header.raw)
        file.truncate(header.file_size)
    (tmp_path / "source" / "config.json").write_text("{}")
    for method in Method:
        (tmp_path / method).mkdir()
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / method), method]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert int(done.stdout) < 100  # MiB, Python and numpy among them
        shutil.rmtree(tmp_path / method)
