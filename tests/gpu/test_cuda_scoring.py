"""A prompt's scores from the GPU engine's host side, with kernels in Triton's interpreter, beside transformers."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import SHAPE, replayed, start
from tests.tiny import make_checkpoint
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.scoring import Scoring

__all__ = ["replayed"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]
VOCAB, LENGTH = 131, 30


def test_a_prompt_is_scored_beside_one_that_is_answered(replayed: list[Hashable], tmp_path: Path) -> None:
    model: Any = make_checkpoint("llama2", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "shards", 1)
    torch.manual_seed(5)
    prompt = torch.randint(3, VOCAB, (LENGTH,)).tolist()
    file = tmp_path / "kept"
    file.write_bytes(bytes(4 * VOCAB * (LENGTH - 1)))
    answers = SamplingParams(max_tokens=12, ignore_eos=True)
    last: dict[str, Output] = {}
    with torch.inference_mode():
        engine = start(tmp_path / "shards", max_num_batched_tokens=8)
        for which in ("keep", "against"):
            scoring = Scoring(1, 0, LENGTH - 1, **{which: str(file)})  # type: ignore[arg-type]
            one = SamplingParams(max_tokens=1, ignore_eos=True)
            engine.apply(Add([Request("a", prompt, answers), Request(which, prompt, one, scoring)]))
            while engine.has_work:
                last.update((output.id, output) for output in engine.step())
        engine.scheduler.check_integrity()
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    kept = torch.from_numpy(np.fromfile(file, dtype=np.float32)).view(LENGTH - 1, VOCAB)
    torch.testing.assert_close(kept.double(), wanted, rtol=0, atol=1e-4)
    scores = last["against"].scores or []
    torch.testing.assert_close(
        torch.tensor([score.logprob for score in scores]).double(),
        wanted[range(LENGTH - 1), prompt[1:]],
        rtol=0,
        atol=1e-4,
    )
    assert max(score.divergence or 0.0 for score in scores) < 1e-6
    assert all(score.same_top for score in scores)
    assert last["a"].scores is None
    assert replayed  # steps that score nothing are replayed as ever
