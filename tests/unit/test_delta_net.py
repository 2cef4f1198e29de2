"""Gated delta nets: the chunked form is the recurrent one, both are transformers', and models are as exact as those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from tests.tiny import make_mixture
from tests.unit.test_models import logits_of
from tpctl.checkpoint.metadata import read_metadata
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.errors import EngineError
from tpctl.layers.delta_net import conv, layer, rule
from tpctl.layers.delta_net.state import LayerState
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig

LENGTHS = (1, 2, 63, 64, 65, 200)
FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
LONG = (70, 1, 64, 1, 1, 129, 2)
"""A prompt in chunks that are longer than those of the rule, and shorter."""


def random_tokens(count: int, keys: int, heads: int, seed: int = 0) -> rule.Tokens:
    rng = torch.Generator().manual_seed(seed)
    q, k = (rule.unit(torch.randn(count, keys, 12, generator=rng)) for _ in "qk")
    a, b = (torch.randn(count, heads, generator=rng) for _ in "ab")
    g, beta = rule.gates(a, b, torch.rand(heads, generator=rng), torch.rand(heads, generator=rng))
    return rule.Tokens(q, k, torch.randn(count, heads, 10, generator=rng), g, beta)


def one_by_one(tokens: rule.Tokens, state_NDE: Tensor) -> Tensor:
    """As the rule is written, a token after the other, in float64."""
    group = tokens.v.shape[1] // tokens.k.shape[1]
    wide = state_NDE.double()
    found = []
    for q, k, v, g, beta in zip(*(one.double() for one in tokens), strict=True):
        q_ND, k_ND = (one.repeat_interleave(group, 0) for one in (q, k))
        wide = wide * g.exp()[:, None, None]
        new = beta[:, None] * (v - torch.einsum("nd,nde->ne", k_ND, wide))
        wide = wide + torch.einsum("nd,ne->nde", k_ND, new)
        found.append(torch.einsum("nd,nde->ne", q_ND, wide))
    state_NDE.copy_(wide)
    return torch.stack(found).float()


@pytest.mark.parametrize(("keys", "heads"), [(1, 1), (2, 2), (2, 6)])
@pytest.mark.parametrize("count", LENGTHS)
def test_chunks_and_steps_are_the_rule(count: int, keys: int, heads: int) -> None:
    tokens = random_tokens(count, keys, heads, seed=count)
    first = torch.randn(heads, 12, 10, generator=torch.Generator().manual_seed(1))
    states = [first.clone() for _ in range(4)]
    expected = one_by_one(tokens, states[0])
    in_chunks = rule.chunks(tokens, states[1])
    in_steps = torch.cat([rule.step(tokens.part(at, at + 1), states[2][None]) for at in range(count)])
    cut = count // 3
    in_parts = torch.cat(
        [rule.chunks(tokens.part(*part), states[3]) for part in ((0, cut), (cut, count)) if part[1] > part[0]]
    )
    for found, state in zip((in_chunks, in_steps, in_parts), states[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, states[0], rtol=1e-4, atol=1e-5)


def test_the_rule_is_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule as theirs

    rng = torch.Generator().manual_seed(3)
    q, k = (torch.randn(130, 2, 12, generator=rng) * 3 for _ in "qk")
    rest = random_tokens(130, 2, 6)
    expected, last = theirs(
        *(one[None] for one in (q, k, rest.v)),
        g=rest.g[None],
        beta=rest.beta[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    state = torch.zeros(6, 12, 10)
    found = rule.chunks(rest._replace(q=rule.unit(q) * 12**-0.5, k=rule.unit(k)), state)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last[0], rtol=1e-4, atol=1e-5)


def test_many_sequences_step_at_once() -> None:
    tokens = random_tokens(5, 2, 6)
    states = torch.randn(5, 6, 12, 10, generator=torch.Generator().manual_seed(1))
    apart = states.clone()
    together = rule.step(tokens, states)
    for at in range(5):
        torch.testing.assert_close(together[at : at + 1], rule.step(tokens.part(at, at + 1), apart[at : at + 1]))
    torch.testing.assert_close(states, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_sees_what_came_before(taps: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(taps)
    x_TX, weight = torch.randn(30, 7, generator=rng).to(dtype), torch.randn(7, 1, taps, generator=rng).to(dtype)
    expected = F.silu(F.conv1d(x_TX.T[None], weight, padding=taps - 1, groups=7)[0, :, :30]).T
    before, found = torch.zeros(taps - 1, 7, dtype=dtype), []
    for start, stop in ((0, 1), (1, 2), (2, 19), (19, 30)):
        seen = torch.cat((before, x_TX[start:stop]))
        found.append(conv.run(seen, conv.taps_of(weight)))
        before = seen[stop - start :]
    state, steps = torch.zeros(1, taps - 1, 7, dtype=dtype), []
    for at in range(30):
        steps.append(conv.step(x_TX[at : at + 1], state, conv.taps_of(weight)))
    for way in (torch.cat(found), torch.cat(steps)):
        assert way.dtype == dtype
        torch.testing.assert_close(way, expected)
    assert state[0].equal(x_TX[30 - taps + 1 :])


@pytest.mark.grid(2)
@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_long_prompts_are_as_near_as_those_of_transformers(
    name: str, tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding grows along a prompt, so what is nearer to the truth is told by computing it in float64."""
    if tp_size == 3:  # as if states were large
        monkeypatch.setattr(layer, "_MOST_GATHERED", 0)
    model = make_mixture(name, tmp_path / "model", max_position_embeddings=512)
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)
    prompts = torch.randint(3, 131, (2, 250), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(prompts).logits
        with monkeypatch.context() as wide:  # transformers computes some of it in float32 whatever the model is in
            wide.setattr(torch.Tensor, "float", torch.Tensor.double)
            wide.setattr(torch, "float32", torch.float64)
            wide.setattr(torch, "float", torch.float64)
            exact = model.double()(prompts).logits
    assert exact.dtype == torch.float64
    ours = logits_of(tmp_path / "shards", tp_size, prompts.tolist(), LONG)
    assert deviation(ours, exact) <= 1.5 * deviation(theirs, exact) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_near_as_that_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "model").bfloat16()
    with torch.no_grad():  # what both read
        model.save_pretrained(tmp_path / "half")
        prompts = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(1))
        theirs, exact = model(prompts).logits, model.float()(prompts).logits
    shard_checkpoint(tmp_path / "half", tmp_path / "shards", 2)
    ours = logits_of(tmp_path / "shards", 2, prompts.tolist())
    assert deviation(ours, exact) <= 1.5 * deviation(theirs, exact)


def test_states_take_what_is_planned(tmp_path: Path) -> None:
    make_mixture("qwen3_next", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 4)
    planned = plan_model(read_metadata(str(tmp_path / "model")), Budget(max_num_seqs=8), tp_size=4)
    memory = 1 << 16

    def rank(group: TPGroup) -> None:
        runner = make_runner(EngineConfig(tmp_path / "shards", 4, kv_cache_memory=memory, max_num_seqs=8), group)
        states = [one for one in runner.kv if isinstance(one, LayerState)]
        held = sum(one.matrices.nbytes + one.inputs.nbytes for one in states)
        slots, loaded, fit = runner.memory.num_states, runner.loaded, planned.ranks[group.rank]
        assert len(states) == 2 and held == slots * loaded.state_bytes
        assert fit.states == 16 and fit.state_bytes == 16 * loaded.state_bytes
        assert held <= memory // 2 and held + runner.memory.num_blocks * loaded.slab_bytes <= memory

    run_ranks(4, torch.inference_mode()(rank))
    assert planned.recurrent == 2 and planned.not_on_gpus is None


def test_a_cache_without_room_for_a_state_is_refused(tmp_path: Path) -> None:
    make_mixture("qwen3_next", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 1)
    with pytest.raises(EngineError, match=r"no room for the recurrent layers' state .* --kv-cache-memory") as refused:
        make_runner(EngineConfig(tmp_path / "shards", 1, kv_cache_memory=5000), TPGroup())
    enough = int(str(refused.value).split("--kv-cache-memory ")[1].split()[0])
    config = EngineConfig(tmp_path / "shards", 1, kv_cache_memory=enough, block_size=4)
    with torch.inference_mode():
        assert make_runner(config, TPGroup()).memory.num_states == 1


def deviation(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).square().mean().sqrt())
