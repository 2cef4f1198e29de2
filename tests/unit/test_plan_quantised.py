"""``plan --quantize`` says what ``shard --quantize`` makes, before anything is read but headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import make_config, source_tensors, write_checkpoint
from tpctl.checkpoint.metadata import ModelMetadata, read_metadata
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.errors import UnsupportedModelError
from tpctl.planning.fit import Budget, plan_model
from tpctl.quantizing.cache import ensure_quantised
from tpctl.quantizing.planned import quantised_metadata
from tpctl.quantizing.schemes import Method
from tpctl.sharding.cutting.shard import shard_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2}


@pytest.fixture(params=["llama", "qwen3_moe"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    import numpy as np

    config = make_config(request.param, **SIZES, **(EXPERTS if request.param == "qwen3_moe" else {}))
    rng = np.random.default_rng(0)
    tensors = {
        one.name: (rng.standard_normal(one.shape).astype("<f4").view("<u4") >> 16).astype("<u2")
        for one in source_tensors(config)
    }
    return write_checkpoint(tmp_path / "model", config, tensors)


def ranks(metadata: ModelMetadata, method: Method) -> list[int]:
    with quantised_metadata(metadata, method) as described:
        report = plan_model(described, Budget(max_model_len=64), tp_size=2)
    return [rank.file_bytes for rank in report.ranks]


@pytest.mark.parametrize("method", Method)
def test_bytes_are_those_of_the_shards(
    model: Path, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    made = ensure_quantised(ResolvedSource(model, "model", None), method, notify=lambda line: None)
    report = shard_checkpoint(made.source.folder, tmp_path / "shards", 2)
    assert ranks(read_metadata(str(model)), method) == [report.bytes_per_rank[rank] for rank in (0, 1)]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    assert ranks(read_metadata(str(tmp_path / "bare")), method) == [report.bytes_per_rank[rank] for rank in (0, 1)]


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config(quantization_config={"quant_method": "fp8"})))
    with (
        pytest.raises(UnsupportedModelError, match="the model is quantised already"),
        quantised_metadata(read_metadata(str(tmp_path)), Method.FP8),
    ):
        raise AssertionError
