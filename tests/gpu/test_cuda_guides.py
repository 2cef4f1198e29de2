"""Grammars and prompts' log-probabilities on the GPU engine's host side, without a GPU: see ``stand_in``."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("llguidance")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import CPU, HOST, SHAPE, replayed  # noqa: F401 — a fixture
from tests.tiny import make_checkpoint
from tests.unit.fake_client import write_tokenizer
from tpctl.client.tokenizer import Tokenizer
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.guiding.guides import Guides
from tpctl.engine.guiding.mask_threads import Finding, MaskThreads
from tpctl.engine.guiding.walk import Walk, Words
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Message, Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="the same general sampler runs on GPUs: test_engine"),
]
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "digits": ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
    "warm": ({"regex": "(ab|c){1,3}", "temperature": 1.0, "top_p": 0.9, "seed": 3}, "(ab|c){1,3}"),
    "words": ({"choice": ["yes", "no"], "logprobs": 1}, "yes|no"),
}


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
@pytest.mark.usefixtures("replayed")
def test_forms_and_prompts_log_probabilities(
    settings: dict[str, Any],
    late: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside requests that the device samples alone, which come as they would without, also where no mask is there in
    time: each token is then computed twice."""
    keys: list[Hashable] = request.getfixturevalue("replayed")
    model: Any = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE, vocab_size=300, eos_token_id=256, bos_token_id=298)
    write_tokenizer(tmp_path / "hf")
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    torch.manual_seed(4)
    prompts = {
        id: torch.randint(3, 250, (length,)).tolist()
        for id, length in zip([*FORMS, "plain", "told"], [5, 20, 7, 9, 37], strict=True)
    }
    params = {id: SamplingParams(max_tokens=12, **fields) for id, (fields, _) in FORMS.items()}
    params["plain"] = SamplingParams(max_tokens=14, ignore_eos=True)
    params["told"] = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=2)
    guides = Guides(Grammars(tmp_path / "hf"))
    values: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 16, "max_num_seqs": 6, "max_model_len": 96}
    arrived: queue.SimpleQueue[Message] = queue.SimpleQueue()
    guides.may_leave_out(arrived.put)
    if late:
        _hold_masks(monkeypatch)
    config = EngineConfig(tmp_path / "tp1", 1, **values, max_num_batched_tokens=24, **settings)
    engine = Engine(config, TPGroup(0, 1, CPU), guides)
    requests = [Request(id, prompts[id], one) for id, one in params.items()]
    for one in requests:
        if one.sampling.guide is not None:
            guides.open(one, guides.grammars.matcher(one.sampling.guide))
    outputs: dict[str, list[Output]] = {id: [] for id in params}
    engine.apply(Add([requests[3]]))
    for step in range(60):
        if step == 2:
            engine.apply(Add([*requests[:3], requests[4]]))
        while not arrived.empty() or (late and step > 2 and engine.scheduler.left_out and not engine.has_work):
            for output in engine.apply(arrived.get(timeout=30)):
                outputs[output.id].append(output)
        for output in engine.step():
            outputs[output.id].append(output)
    assert not engine.has_work and not engine.scheduler.left_out
    engine.scheduler.check_integrity()
    tokenizer = Tokenizer(tmp_path / "hf")
    for id, (_, pattern) in FORMS.items():
        text = tokenizer.decode([token for output in outputs[id] for token in output.token_ids])
        assert outputs[id][-1].finish_reason == "stop" and re.fullmatch(pattern, text), (id, text)
    with torch.no_grad():
        plain = [token for output in outputs["plain"] for token in output.token_ids]
        logits = model(torch.tensor([prompts["plain"] + plain])).logits[0, len(prompts["plain"]) - 1 : -1]
        assert plain == logits.argmax(-1).tolist()
        wanted = model(torch.tensor([prompts["told"]])).logits[0, :-1].log_softmax(-1)
    told = outputs["told"][0].prompt_logprobs
    assert told is not None and len(told) == len(prompts["told"]) - 1
    for entry, row, token in zip(told, wanted, prompts["told"][1:], strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert any(key[-1] is HOST for key in keys) == ("enforce_eager" not in settings)  # type: ignore[index]


def _hold_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each mask be found once its sequence was left out."""
    left: dict[tuple[str, int], threading.Event] = {}
    mask, leave = Walk.mask, MaskThreads.leave

    def of(item: ScheduledSequence) -> threading.Event:
        return left.setdefault((item.sequence.id, item.num_generated), threading.Event())

    def held(walk: Walk, item: ScheduledSequence, words: Words) -> str | None:
        assert of(item).wait(30)
        return mask(walk, item, words)

    def leaves(threads: MaskThreads, finding: Finding) -> bool:
        late = leave(threads, finding)
        of(finding.item).set()
        return late

    monkeypatch.setattr(Walk, "mask", held)
    monkeypatch.setattr(MaskThreads, "leave", leaves)
