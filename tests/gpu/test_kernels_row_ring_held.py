"""The experts that a rank holds of published models, of a small size, are of the forms that `row_ring` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

from safetensors.torch import load_file

from tests.unit.test_bench_shapes import SMALL
from tpctl.arch.block import linears
from tpctl.arch.held import HeldLinear
from tpctl.arch.source_plan import build_plan
from tpctl.bench import synthetic
from tpctl.bench.shapes import SHAPES
from tpctl.bench.synthetic import shape_config, synthetic_shards
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.row_ring import in_blocks, ring_kind
from tpctl.layers.weights.stored import to_codes

pytestmark = pytest.mark.gpu  # with Triton; none is needed


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name,kind", [("qwen3-30b-a3b-fp8", "e4m3"), ("gpt-oss-20b", "e2m1")])
def test_what_is_held_is_read(name, kind, tp_size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {key: value for key, value in SMALL.items() if key in SHAPES[name]}
    monkeypatch.setitem(SHAPES, name, SHAPES[name] | small)
    monkeypatch.setattr(synthetic, "_BLOCK", 1 << 20)  # values: more than any tensor has here
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path))
    config, seen = shape_config(name), 0
    (file,) = synthetic_shards(name, tp_size).folder.glob(f"model-rank-{tp_size - 1}-*.safetensors")
    tensors, plan, blueprint = load_file(file), build_plan(config, tp_size), config.blueprint
    for linear in (one for part in blueprint.layers[0].parts for one in linears(part)):
        held = HeldLinear.of(linear, plan, tp_size - 1, blueprint.prefix.format(0), tensors.keys())
        if held.experts is None or held.is_dense:
            continue
        (codes,) = to_codes(held, {one: tensors[held.name + one].clone() for one in held.shapes})  # aligned
        assert ring_kind(CodedMatrix(codes)) == kind and in_blocks(CodedMatrix(codes))
        seen += 1
    assert seen == 2
