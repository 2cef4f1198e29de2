"""The plan of whole models: every source element on the right ranks, and refused checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.synthetic import RUN, make_config
from tpctl.arch.blueprint import LM_HEAD
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.errors import CheckpointError, PartitionError
from tpctl.partition.cuts import Even, KVHeads, Units, split_heads
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import EACH, Part, Rule, TensorSplit, tensor_names


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A random small model of any family, and a tensor-parallel size that it allows."""
    kv, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    tp = draw(st.integers(1, kv * group))
    raw = make_config(
        draw(st.sampled_from(RUN)),
        hidden_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        head_dim=2 * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(tp, 100)),
        vocab_size=draw(st.integers(1, 200)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )
    return ModelConfig.from_dict(raw), tp


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_every_source_element_is_held_by_the_right_number_of_ranks(model: tuple[ModelConfig, int]) -> None:
    config, tp = model
    plan = build_plan(config, tp)
    copies = {name: np.zeros(shape, int) for name, shape in plan.source_shapes.items()}
    for _, stored, piece in plan.pieces():
        apart = int(EACH in piece.source)  # a tensor an expert
        window = tuple(slice(a, a + n) for a, n in zip(piece.start[apart:], piece.shape[apart:], strict=True))
        for source in piece.tensors:
            before = copies[source][window]
            assert before.shape == piece.shape[apart:], (stored.name, "reaches outside its source")
            copies[source][window] += 1
    for split in plan.splits:
        for part in split.parts:
            count = 0 if split.stack is None else split.stack.count
            counted = np.stack([copies[source] for source in tensor_names(part.source, count)])
            axis = counted.ndim - len(split.shape(0)) + split.dim  # behind those of the stack
            rows = counted.take(range(part.offset, part.offset + part.length), axis=axis)
            if split.rule is Rule.REPLICATED:
                assert (rows == tp).all(), split.name
            elif isinstance(part.cut, KVHeads):
                held = np.zeros(part.cut.num_kv_heads, int)
                for share in split_heads(part.cut.num_heads, part.cut.num_kv_heads, tp):
                    held[share.kv.start : share.kv.stop] += 1
                wanted = np.repeat(held, part.cut.head_dim)
                assert (rows[0].reshape(len(wanted), -1) == wanted[:, None]).all(), split.name
            else:
                assert (rows == 1).all(), split.name


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_pieces_are_disjoint_inside_their_stored_tensor_and_leave_only_vocabulary_padding(
    model: tuple[ModelConfig, int],
) -> None:
    plan = build_plan(*model)
    for shard in plan.shards:
        for stored in shard.values():
            covered = np.zeros(stored.shape, int)
            for piece in stored.pieces:
                covered[tuple(slice(a, a + n) for a, n in zip(piece.at, piece.shape, strict=True))] += 1
            assert covered.max(initial=0) <= 1, stored.name
            assert int((covered == 0).sum()) == stored.padding
            if stored.rule is not Rule.VOCAB:
                assert stored.padding == 0, stored.name


def test_tied_embeddings_are_stored_once_under_the_heads_name() -> None:
    tied = build_plan(ModelConfig.from_dict(make_config(tie_word_embeddings=True)), 2)
    assert LM_HEAD in tied.shards[0]
    assert "model.embed_tokens.weight" not in tied.shards[0]
    untied = build_plan(ModelConfig.from_dict(make_config()), 2)
    assert {LM_HEAD, "model.embed_tokens.weight"} <= untied.shards[0].keys()


def _plan(**changes: Any) -> PartitionPlan:
    return build_plan(ModelConfig.from_dict(make_config(**changes)), 2)


def test_a_missing_tensor_is_named_with_the_shape_it_should_have() -> None:
    plan = _plan()
    shapes = dict(plan.source_shapes)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight \(40 x 24"):
        plan.check_source(shapes)


def test_another_shape_is_named_with_both() -> None:
    plan = _plan()
    with pytest.raises(CheckpointError, match="24 x 41 in the checkpoint but 24 x 40 by config"):
        plan.check_source({**plan.source_shapes, "model.layers.0.mlp.down_proj.weight": (24, 41)})


def test_an_unknown_tensor_is_refused_and_a_known_useless_one_is_not() -> None:
    config = ModelConfig.from_dict(make_config(tie_word_embeddings=True))
    plan = build_plan(config, 2)
    with pytest.raises(CheckpointError, match=r"does not use: model\.vision\.weight"):
        plan.check_source({**plan.source_shapes, "model.vision.weight": (1,)})
    useless = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plan.check_source({**plan.source_shapes, useless: (3,)}, config.blueprint.unread({useless}))


def test_too_many_ranks_for_the_intermediate_size() -> None:
    with pytest.raises(PartitionError, match="at most 3"):
        build_plan(ModelConfig.from_dict(make_config(intermediate_size=3)), 4)


def test_parts_beside_each_other() -> None:
    """As in a merged weight that is stored [in, out]."""
    parts = tuple(Part(name, 8, Even()) for name in ("a", "b"))
    plan = PartitionPlan.build([TensorSplit("side", Rule.MERGED_COLUMN, parts, dim=1, others=(4,))], 2)
    assert plan.shape(1, "side") == (4, 8)
    assert [(piece.source, piece.start, piece.shape, piece.at) for piece in plan.shards[1]["side"].pieces] == [
        ("a", (0, 4), (4, 4), (0, 0)),
        ("b", (0, 4), (4, 4), (0, 4)),
    ]


@pytest.mark.parametrize(("offset", "wrong"), [(1, False), (0, True), (2, True)])
def test_parts_of_one_source_have_no_more_in_common_than_the_scale_between_them(offset: int, wrong: bool) -> None:
    """Of 6 and 6 features in blocks of 4."""
    first = Part("s", 2, Units(Even(), 4, 6), label="a")
    second = Part("s", 2, Units(Even(), 4, 6, before=2), offset=offset, label="b")
    split = TensorSplit("side", Rule.MERGED_COLUMN, (first, second))
    if wrong:
        with pytest.raises(PartitionError, match=f"b begins at entry {offset} of s, but what is before it ends at 2"):
            PartitionPlan.build([split], 2)
        return
    plan = PartitionPlan.build([split], 2)
    assert plan.source_shapes == {"s": (3,)}
    assert [(piece.label, piece.start, piece.shape) for piece in plan.shards[0]["side"].pieces] == [
        ("a", (0,), (1,)),
        ("b", (1,), (2,)),
    ]
    assert [piece.start for piece in plan.shards[1]["side"].pieces] == [(0,), (2,)]


def test_a_part_that_nothing_of_a_source_is_before_is_found() -> None:
    split = TensorSplit("side", Rule.COLUMN, (Part("s", 4, Even(), offset=2),))
    with pytest.raises(PartitionError, match="its part begins at entry 2 of s, but what is before it ends at 0"):
        PartitionPlan.build([split], 2)
