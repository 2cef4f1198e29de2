"""The layer that predicts one token more against transformers' own (``MtpModel``), of families for which it has one.

For Qwen's, which it leaves out, ``test_predictor.py`` has the published formula.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, cache_utils, modeling_layers

from tests.tiny_predicting import LAYERS, make_copying, make_predicting
from tests.unit.generating import SHARED, run
from tests.unit.generating import requests as greedy
from tests.unit.test_predictor import DAMP, LONG, MTP, PROMPTS, _real, predicted, rows_cost_nothing  # noqa: F401
from tpctl.sharding.cutting.shard import shard_checkpoint

if not hasattr(modeling_layers, "MtpModel"):
    pytest.skip("this transformers has no layers that predict more", allow_module_level=True)
NAMES = ("glm4_moe", "deepseek_v3")
SIZES = (1, 2, 5)


def by_transformers(folder: Path) -> Any:
    """The model in ``folder``. Which layer is the further one transformers knows by the published models' numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.config._experts_implementation = "eager"  # the others want rows of whole 16 bytes
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\..*"]
    assert model.config.num_mtp_layers == 1 and model.config.num_hidden_layers == LAYERS
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def logits_of(model: Any, states: Tensor, following: list[int]) -> Tensor:
    """[T, V] behind the first T tokens of a sequence, of their ``states`` [T, H] and the token behind each."""
    layer = modeling_layers.MtpModel.from_pretrained(model)
    cache = cache_utils.MtpCache(config=model.config.get_mtp_config())
    positions = torch.arange(1, 1 + len(following))[None]
    made = layer.forward_layer(0, states[None], positions, cache, input_ids=torch.tensor([following]))
    return model.lm_head(made)[0]


@pytest.fixture(scope="module", params=NAMES)
def random(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Shards of a model at each size, and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    make_predicting(request.param, folder / "model")
    for size in SIZES:
        shard_checkpoint(folder / "model", folder / f"tp{size}", size)
    return folder, by_transformers(folder / "model")


@pytest.mark.parametrize("tp_size", SIZES)
def test_logits_equal_transformers(tp_size: int, random: tuple[Path, Any]) -> None:
    folder, model = random
    ids = SHARED[:30]
    states, found, _ = predicted(folder / f"tp{tp_size}", tp_size, ids, [4])
    with torch.no_grad():
        wanted = model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states[-1][0]
    assert states.numpy() == pytest.approx(wanted.numpy(), abs=1e-3)
    assert _real(found, tp_size) == pytest.approx(logits_of(model, wanted, ids[1:]).numpy(), abs=1e-4, rel=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_cost_nothing")
def test_tokens_equal_those_that_transformers_drafts(name: str, tmp_path: Path) -> None:
    make_copying(name, tmp_path / "model", DAMP.get(name, 0.03))
    shard_checkpoint(tmp_path / "model", tmp_path / "tp2", 2)
    model, prompts = by_transformers(tmp_path / "model"), [PROMPTS[1], LONG[1]]
    tokens, stats = run(tmp_path / "tp2", 2, [greedy("", prompts, max_tokens=20)], kv_cache_memory=1 << 22, **MTP)
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 20, "do_sample": False, "use_mtp": True}
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert tokens[str(number)] == answer[0, len(prompt) :].tolist()
