"""MXFP4 as gpt-oss has it: stacked experts, rows of gate and up in turn, blocks of 32 inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.packers import mxfp4, read_mxfp4
from tests.unit.packing import Packer
from tests.unit.quantised_model import Local, Quantised, assembled, locals_of
from tpctl.arch.block import CutBlock, Experts, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.fields import Fields
from tpctl.arch.formats import read_scheme
from tpctl.arch.linear import Linear, Norm
from tpctl.arch.quantised import Cutting, cut_by, quantised
from tpctl.arch.storage import FUSED_TRANSPOSED
from tpctl.errors import PartitionError
from tpctl.partition.cuts import Even, Scaled, Whole
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import Part, Rule, Stack

EXPERTS = "model.layers.0.mlp.experts"
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def experts(hidden: int, width: int, count: int) -> Experts:
    stack = Stack(count, Whole())
    gate_up = Part("mlp.experts.gate_up_proj", 2 * width, Scaled(Even(), 2), label="gate_up")
    w13 = Linear("mlp.experts.w13", Rule.MERGED_COLUMN, (gate_up,), hidden, bias=True, stack=stack)
    down = Part("mlp.experts.down_proj", hidden, Whole())
    w2 = Linear("mlp.experts.w2", Rule.ROW, (down,), width, Even(), bias=True, stack=stack)
    pair = (replace(one, storage=FUSED_TRANSPOSED, joiner="_", bias_suffix="_bias") for one in (w13, w2))
    return Experts(count, 2, *pair, router=())


def blueprint(hidden: int, width: int, count: int, quantization: dict[str, object] | None = None) -> Blueprint:
    mixer = Mixer("nothing", (), 16, 1, 0)
    layer = CutBlock(mixer, (mixer, experts(hidden, width, count)))
    made = Blueprint(64, hidden, (layer,), Norm("model.norm", hidden, 1e-5), tied=True)
    scheme = read_scheme(Fields({"quantization_config": CONFIG if quantization is None else quantization}))
    assert scheme is not None
    return quantised(made, scheme)


@dataclass(frozen=True)
class GptOss(Quantised):
    """Of one layer of experts and no attention."""

    blueprint: Blueprint

    def plan(self, tp: int, cutting: Cutting = Cutting()) -> PartitionPlan:
        plan = PartitionPlan.build(list(cut_by(self.blueprint, cutting).splits()), tp)
        plan.check_source({name: tuple(one.shape) for name, one in self.tensors.items()})
        return plan


def make(hidden: int, width: int, count: int, seed: int) -> GptOss:
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(64, hidden) for name in ("model.embed_tokens.weight",)}
    tensors["model.norm.weight"] = torch.randn(hidden)
    matrices = {}
    for name, outputs, inputs in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        made = [mxfp4(outputs, inputs, rng) for _ in range(count)]
        for suffix in made[0][0]:
            tensors[f"{EXPERTS}.{name}{suffix}"] = torch.stack([one[suffix] for one, _ in made])
        tensors[f"{EXPERTS}.{name}_bias"] = torch.randn((count, outputs), generator=rng)
        matrices |= {f"{EXPERTS}.{name}[{number}]": matrix.numpy() for number, (_, matrix) in enumerate(made)}
    packer = Packer(CONFIG, ("weight", (0, 1), (1, 32)), mxfp4, read_mxfp4)
    return GptOss({}, packer, tensors, matrices, blueprint(hidden, width, count))


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(4, 12), tp=st.integers(1, 4), groups=st.sampled_from([1, 2]), even=st.booleans(), seed=st.just(0)
)
def test_sums_of_ranks(blocks: int, tp: int, groups: int, even: bool, seed: int) -> None:
    hidden, width, count = 64, 32 * blocks, 3
    model, tp = make(hidden, width, count, seed), tp * groups
    plan = model.plan(tp, Cutting(groups, even))
    x = np.random.default_rng(seed).standard_normal((2, hidden))
    shards = [assembled(plan, model.tensors, rank) for rank in range(tp)]
    held = [locals_of(model, plan, rank, shard) for rank, shard in enumerate(shards)]
    for number in range(count):
        up, down = (f"{EXPERTS}.{name}_proj[{number}]" for name in ("gate_up", "down"))
        bias = {name: model.tensors[f"{EXPERTS}.{name}_proj_bias"][number].numpy() for name in ("gate_up", "down")}
        whole = [Local(np.arange(len(m)), np.arange(m.shape[1]), m) for m in (model.matrices[up], model.matrices[down])]
        expected = _mlp(x, whole[0], whole[1], bias["gate_up"]) + bias["down"]
        total, biased = np.zeros_like(expected), 0
        for rank, has in enumerate(held):
            if up not in has:
                continue
            for name in (up, down):
                place = np.ix_(has[name].outputs, has[name].inputs)
                np.testing.assert_array_equal(has[name].matrix, model.matrices[name][place])
            first = plan.shards[rank][f"{EXPERTS}.w13_bias"].pieces[0].start[0]
            total += _mlp(x, has[up], has[down], shards[rank][f"{EXPERTS}.w13_bias"][number - first].numpy())
            if not biased:  # by the first rank that has the expert
                total += shards[rank][f"{EXPERTS}.w2_bias"][number - first].numpy()
            biased += 1
        assert biased == tp // groups
        np.testing.assert_allclose(total, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def _mlp(x: np.ndarray, up: Local, down: Local, bias: np.ndarray) -> np.ndarray:
    """As gpt-oss: gate and up in turn, a clamped gate."""
    both = x @ up.matrix.T.astype(np.float64) + bias
    gate, linear = both[:, ::2].clip(max=7), both[:, 1::2].clip(-7, 7)
    assert (down.inputs == up.outputs[::2] // 2).all()
    return np.asarray(((linear + 1) * gate * np.tanh(gate / 2)) @ down.matrix.T)


def test_a_block_is_never_divided() -> None:
    with pytest.raises(PartitionError, match=r"w13_weight: .* into 4 parts of whole multiples of 32: only 3 exist"):
        make(64, 96, 2, 0).plan(4)


def test_experts_that_stay_floats() -> None:
    skipped = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.mlp.experts"]}
    splits = {split.name: split for split in blueprint(64, 64, 2, skipped).splits()}
    assert splits[f"{EXPERTS}.w13_weight"].dtypes is None and f"{EXPERTS}.w13_weight_scale" not in splits
