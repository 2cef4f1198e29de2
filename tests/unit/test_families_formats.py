"""Every family in several quantised formats, which take turns: shards that are proven, planned, merged and cut anew.

Random bytes stand for weights; what the formats' numbers mean is tested in ``test_formats``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.packers import PACKERS
from tests.unit.synthetic import folder_bytes, make_config, source_tensors
from tpctl.arch.block import Experts
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.safetensors import build_header
from tpctl.errors import PartitionError, UnsupportedModelError
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
COMMON = ("hidden_size", "head_dim", "intermediate_size", "num_hidden_layers")
TEXTS = [name for name, family in FAMILIES.items() if family.inner is None]
FORMATS = sorted(PACKERS)
TURNS = [
    (family, FORMATS[(3 * place + turn) % len(FORMATS)])
    for place, family in enumerate(sorted(TEXTS))
    for turn in (0, 1, 2)
]
REFUSED = ("inside of a word", "are stored as one", "such fused tensors cannot be cut", "is not supported")
"""What a tiny model of a family may not have in a format, by name."""


def config_of(family: str, packing: str) -> dict[str, Any]:
    known = FAMILIES[family].defaults
    sizes = {key: value for key, value in SIZES.items() if key in COMMON or key in known}
    if "qk_nope_head_dim" in known:  # latent attention has no other size of a head
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = 4
    return make_config(family, **sizes, quantization_config=dict(PACKERS[packing].config))


def write(folder: Path, config: dict[str, Any]) -> Path:
    """Random bytes, but for the order of GPTQ's groups, which has to be one."""
    folder.mkdir()
    rng, header = np.random.default_rng(0), build_header(source_tensors(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header.raw)
        for name, info in header.tensors.items():
            data = rng.integers(0, 256, info.nbytes, dtype=np.uint8).tobytes()
            if name.endswith(".g_idx"):
                size = config["quantization_config"]["group_size"]
                data = (np.arange(info.shape[0]) // (size if size > 0 else info.shape[0])).astype("<i4").tobytes()
            file.write(data)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.mark.parametrize(("family", "packing"), TURNS)
def test_a_family_in_a_format(tmp_path: Path, family: str, packing: str) -> None:
    config = config_of(family, packing)
    try:
        source = write(tmp_path / "source", config)
        layers = ModelConfig.from_dict(config).blueprint.layers
        dealt = any(isinstance(part, Experts) for layer in layers for part in layer.parts)
        before = None
        for tp_size, cutting in [(1, Cutting()), (3, Cutting()), (2, Cutting(2) if dealt else Cutting(even=True))]:
            out = tmp_path / f"tp{tp_size}"
            report = shard_checkpoint(source, out, tp_size, cutting=cutting)
            verified = inspect_shards(out, verify=True, source=source).verified
            assert verified is not None and verified.compared_bytes == verified.hashed_bytes
            merge_shards(out, tmp_path / "merged", force=True)
            assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
            planned = plan_model(
                read_metadata(str(source)), Budget(), tp_size=tp_size, cutting=lambda size, cutting=cutting: cutting
            )
            assert {rank.rank: rank.file_bytes for rank in planned.ranks} == report.bytes_per_rank
            if before is not None:
                reshard(before, tmp_path / "again", tp_size, cutting=cutting, force=True)
                assert folder_bytes(tmp_path / "again") == folder_bytes(out)
            before = out
    except (PartitionError, UnsupportedModelError) as error:
        assert any(reason in str(error) for reason in REFUSED), error
