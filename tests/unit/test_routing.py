"""Routing against the routers of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tpctl.arch.routing import Routing
from tpctl.kernels.experts.routing_reference import route

TOKENS, HIDDEN = 257, 48


def deepseek(groups: int, top_groups: int, renormalise: bool = True, scale: float = 2.5) -> Routing:
    return Routing("sigmoid", renormalise, groups, top_groups, scale, 1e-20)


CASES: list[tuple[type, int, int, Routing]] = [
    (Qwen3MoeTopKRouter, 128, 8, Routing("softmax", renormalise=True)),
    (Qwen3MoeTopKRouter, 128, 8, Routing("softmax")),
    (Qwen2MoeTopKRouter, 60, 4, Routing("softmax")),
    (Qwen2MoeTopKRouter, 60, 4, Routing("softmax", renormalise=True)),
    (MixtralTopKRouter, 8, 2, Routing("softmax", renormalise=True)),
    (GptOssTopKRouter, 32, 4, Routing("softmax of chosen")),
    (Glm4MoeTopkRouter, 128, 8, deepseek(1, 1, scale=1.0)),
    (Glm4MoeTopkRouter, 24, 8, deepseek(4, 2, renormalise=False, scale=1.5)),
    (DeepseekV3TopkRouter, 256, 8, deepseek(8, 4)),
    (DeepseekV3TopkRouter, 16, 16, deepseek(4, 4)),
    (MiniMaxM2TopKRouter, 256, 8, Routing("sigmoid", renormalise=True)),
]


@pytest.mark.parametrize("router,count,per_token,routing", CASES)
def test_as_transformers(router: type, count: int, per_token: int, routing: Routing) -> None:
    generator = torch.Generator().manual_seed(count + per_token)
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        num_experts=count,
        num_local_experts=count,
        num_experts_per_tok=per_token,
        norm_topk_prob=routing.renormalise,
        n_group=routing.groups,
        topk_group=routing.top_groups,
        routed_scaling_factor=routing.scale,
    )
    module = router(config)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator) / HIDDEN**0.5
    correction, more = None, ()  # type: Any, tuple[Any, ...]
    if routing.scores == "sigmoid":
        correction = torch.randn(count, generator=generator)
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = correction
        else:
            more = (correction,)
    with torch.no_grad():
        logits, weights, ids = module(x, *more)
        got_ids, got = route(logits, routing, per_token, correction)
    assert got_ids.dtype == torch.int32 and got.dtype == torch.float32
    order, got_order = ids.sort(-1), got_ids.long().sort(-1)
    assert torch.equal(got_order.values, order.values)
    torch.testing.assert_close(got.gather(1, got_order.indices), weights.gather(1, order.indices), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "softmax of chosen"])
def test_equal_scores_go_to_the_smaller_expert(scores: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 0.0, 2.0]])
    ids, weights = route(logits, Routing(scores), 5)
    assert ids.tolist() == [[1, 3, 7, 2, 4]]
    assert weights[0, 0] == weights[0, 2] and weights[0, 3] == weights[0, 4]
    even = torch.zeros(1, 8)
    assert route(even, Routing(scores, groups=4, top_groups=2), 3)[0].tolist() == [[0, 1, 2]]


def test_a_correction_chooses_and_does_not_weigh() -> None:
    logits, correction = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 1.0, 0.5])
    ids, weights = route(logits, Routing("sigmoid"), 2, correction)
    assert ids.tolist() == [[2, 3]] and weights.tolist() == [[0.5, 0.5]]


def test_groups_are_as_good_as_their_two_best() -> None:
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0, 0.9, 0.9]])
    routing = Routing("softmax of chosen", groups=3, top_groups=1)
    assert route(logits, routing, 2)[0].tolist() == [[2, 3]]
