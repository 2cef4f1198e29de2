"""Real weights in other forms: SmolLM2 as mixtures of experts that are the dense model by construction, and rounded
into each format, beside transformers with what the codes stand for, in float32. 576 are four and a half blocks of 128.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.real_answers import TEXTS, run_in_threads
from tests.distributed.real_forms import (
    FORMATS,
    MIXTURES,
    in_blocks_of_four_bits,
    linears,
    mixture,
    of_fp8,
    read,
    rounded,
    shallow,
)
from tests.unit.test_models import logits_of
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.client.tokenizer import Tokenizer
from tpctl.quantizing.schemes import Method
from tpctl.quantizing.writer import quantise_checkpoint
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = pytest.mark.slow

PROMPT_LENGTH, LENGTH = 12, 8
IN_CI = {("copies", 2), ("slices", 3), ("fp8-block", 3), ("gptq", 2)}
"""Forms and sizes that are always tried; the rest, and all of the model's layers, with ``--whole-grid``."""
LAYERS = 6
FIRST, NEAR = 4, 1e-3
"""How many tokens of a prompt have activations of some thousands, and how near their logits are to be. From those in
float64 the dense model's own are, in float32 on one rank, 5e-4 at the first token, 1.4e-4 at the third, 1e-4 behind."""
GROUPS = {("copies", 3): 3, ("slices", 2): 2}
"""Groups of ranks that experts are dealt to, where not all ranks cut each."""


@pytest.fixture(scope="module")
def prompts(demo: ResolvedSource) -> list[list[int]]:
    tokenizer = Tokenizer(demo.folder)
    return [tokenizer.encode(text)[:PROMPT_LENGTH] for text in TEXTS[:4]]


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, demo: ResolvedSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model."""
    if request.config.getoption("--whole-grid"):
        return demo.folder
    return shallow(demo.folder, tmp_path_factory.mktemp("shallow") / "model", LAYERS)


@pytest.fixture
def model(source: Path) -> Any:
    """The same by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not stay: the forms take gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def wanted(request: pytest.FixtureRequest, name: str, tp_size: int) -> None:
    if (name, tp_size) not in IN_CI and not request.config.getoption("--whole-grid"):
        pytest.skip("a case of --whole-grid")


def check(model: Any, folder: Path, prompts: list[list[int]], tp_size: int, groups: int = 1) -> None:
    """``folder`` cut and run answers the tokens that ``model`` likes best, and its logits are the same."""
    shards = folder.with_name("shards")
    shard_checkpoint(folder, shards, tp_size, cutting=Cutting(groups))
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    config = EngineConfig(shards, tp_size, dtype="float32", kv_cache_memory=64 << 20, block_size=16)
    found, _ = run_in_threads(config, [[Request(str(n), ids, params) for n, ids in enumerate(prompts)]])
    answers = [found[str(n)] for n in range(len(prompts))]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        logits = model(torch.tensor(whole)).logits
    assert logits[:, PROMPT_LENGTH - 1 : -1].argmax(-1).tolist() == answers
    assert len({tuple(answer) for answer in answers}) == len(prompts)
    own = logits_of(shards, tp_size, whole[:2], dtype="float32", kv_cache_memory=32 << 20)
    torch.testing.assert_close(own[:, FIRST:], logits[:2, FIRST:], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(own[:, :FIRST], logits[:2, :FIRST], rtol=1e-4, atol=NEAR)


def replaced(model: Any, matrices: dict[str, torch.Tensor]) -> Any:
    """``model`` with other weights."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, matrix in matrices.items():
            own[name].copy_(matrix)
    return model


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_that_are_the_dense_model(
    request: pytest.FixtureRequest, source: Path, prompts: list[list[int]], place: Path, name: str, tp_size: int
) -> None:
    wanted(request, name, tp_size)
    folder = mixture(name, source, place / "model")
    check(request.getfixturevalue("model"), folder, prompts, tp_size, GROUPS.get((name, tp_size), 1))


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["fp8", "fp8-block", *FORMATS, "mxfp4"])
def test_weights_rounded_into_a_format(
    request: pytest.FixtureRequest, source: Path, prompts: list[list[int]], place: Path, name: str, tp_size: int
) -> None:
    wanted(request, name, tp_size)
    folder = place / "model"
    if name.startswith("fp8"):
        folder.mkdir()
        quantise_checkpoint(CheckpointFolder.open(source), folder, Method(name))
        _, tensors = read(folder)
        matrices = {f"{module}.weight": of_fp8(tensors, module) for module in linears(tensors)}
    else:
        make = in_blocks_of_four_bits if name == "mxfp4" else partial(rounded, name)
        matrices = make(source, folder)
    check(replaced(request.getfixturevalue("model"), matrices), folder, prompts, tp_size)
