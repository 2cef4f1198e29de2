"""Which backend and which form of the KV cache: the planner, the engine and the front come to the same."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.synthetic import make_config, source_tensors
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.attention_choice import Choice, Heads, choose
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.client.prepare import _check_run
from tpctl.engine.runners import outline
from tpctl.errors import UsageError
from tpctl.layers.attention import select
from tpctl.layers.attention.sdpa import SdpaBackend
from tpctl.planning.model_sizes import ModelSizes
from tpctl.wire.settings import EngineConfig, EngineSettings


class OfTriton(SdpaBackend):
    """In the place of a backend whose kernels need Triton: built with the same arguments, and asked for its form."""

    name = "triton"
    form = "model"

    def __init__(self, layers: Any, block_size: int, form: Any = "model", pools: Any = None) -> None:
        super().__init__(layers, block_size, pools)
        self.form = form

    @property
    def kv_form(self) -> Any:
        return self.form


class OfLatents(SdpaBackend):
    name = "triton"

    def __init__(self, layers: Any, block_size: int, pools: Any, dtype: torch.dtype) -> None:
        super().__init__(layers, block_size, pools)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "find_spec", lambda package: object())
    monkeypatch.setattr("tpctl.client.prepare.find_spec", lambda package: object())
    for module, name, backend in [
        ("triton", "TritonBackend", OfTriton),
        ("triton_latent", "TritonLatentBackend", OfLatents),
    ]:
        made = ModuleType(module)
        setattr(made, name, backend)
        monkeypatch.setitem(sys.modules, f"tpctl.layers.attention.{module}", made)


def engine_form(config: ModelConfig, dtype: str, asked: str) -> str:
    """What the engine's backend keeps on a GPU; what it is refused for."""
    settings, group = EngineConfig(Path(), 1, device="cuda", kv_cache_dtype=asked), SimpleNamespace(rank=0, size=1)
    group.kind = "cuda"
    made_of = config.blueprint.without_predictor()
    try:
        backend, _, _ = outline._backends(settings, group, getattr(torch, dtype), made_of, 4096)  # type: ignore[arg-type]
    except UsageError as refusal:
        return str(refusal)
    return backend.kv_form


def planned_form(config: ModelConfig, raw: dict[str, Any], dtype: str, asked: str) -> str:
    metadata = ModelMetadata(Path(), "m", None, {tensor.name: tensor for tensor in source_tensors(raw)})
    cast = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    try:
        return ModelSizes(config, metadata, cast, asked).kv_form
    except UsageError as refusal:
        return str(refusal)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.runs])
def test_the_planner_counts_what_the_engine_keeps(family: str, head_dim: int) -> None:
    raw = make_config(family, head_dim=head_dim)
    config = ModelConfig.from_dict(raw)
    for dtype, asked in [("bfloat16", "auto"), ("bfloat16", "fp8"), ("float16", "packed"), ("float32", "fp8")]:
        assert planned_form(config, raw, dtype, asked) == engine_form(config, dtype, asked), (dtype, asked)


def test_layers_without_heads_do_not_count() -> None:
    """Of gated delta nets nothing is kept in blocks."""
    raw = make_config("qwen3_5_moe", head_dim=64)
    config = ModelConfig.from_dict(raw)
    assert planned_form(config, raw, "bfloat16", "fp8") == engine_form(config, "bfloat16", "fp8") == "fp8"


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("deepseek_v3", {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 needs keys and values of heads, not latent"),
        ("deepseek_v3", {"kv_cache_dtype": "packed", "device": "cuda"}, "packed needs keys and values of heads, not"),
        ("deepseek_v3", {"attention_backend": "flash-attn", "device": "cuda"}, "flash-attn knows no latent attention"),
        ("gpt_oss", {"attention_backend": "flash-attn", "device": "cuda"}, "flash-attn knows no attention sinks"),
        ("qwen3", {"kv_cache_dtype": "fp8", "device": "cuda"}, "fp8 needs heads of 64, 128, 256 dimensions on a GPU"),
        ("qwen3", {"block_size": 48, "device": "cuda"}, "--block-size 48 does not suit triton; use a power of two"),
        (
            "qwen3",
            {"attention_backend": "flash-attn", "dtype": "float32", "device": "cuda"},
            "flash-attn computes in bfloat16 or float16, not float32",
        ),
    ],
)
def test_the_front_refuses_before_anything_is_fetched(family: str, settings: dict[str, Any], said: str) -> None:
    config = ModelConfig.from_dict(make_config(family))
    with pytest.raises(UsageError, match=said):
        _check_run(config, EngineSettings(**settings))
    _check_run(config, EngineSettings(device=settings.get("device", "cpu")))


def test_a_dtype_that_is_not_known_yet_refuses_nothing() -> None:
    heads = [Heads(64)]
    assert choose("auto", "packed", "cuda", None, heads) == Choice("triton", "packed")
    with pytest.raises(UsageError, match="packed needs bfloat16, not float16"):
        choose("auto", "packed", "cuda", "float16", heads)
