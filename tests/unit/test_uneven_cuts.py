"""The sizes at which an even cut of published models falls inside what has one scale: cut, proven, and told in
``docs/where-even-cuts-fail.md``, which is compared with what ``plan`` says. After a wanted change:
``python -m tests.unit.test_uneven_cuts > docs/where-even-cuts-fail.md``.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.arch.block import Experts, Gated
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.metadata import read_metadata
from tpctl.errors import counted
from tpctl.partition.cuts import Range
from tpctl.planning.check import SizeCheck
from tpctl.planning.fit import Budget, plan_model
from tpctl.planning.peers import Objection
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

PAGE = Path(__file__).parent.parent.parent / "docs" / "where-even-cuts-fail.md"

FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["model.layers.0.self_attn", "lm_head"],
}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": _FP4, "input_activations": {**_FP4, "dynamic": "local"}}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": ["self_attn", "lm_head"],
}


@dataclass(frozen=True)
class Row:
    """A published model.

    Attributes:
        what: of it has the inner size ``width``.
        unit: features along it that have one scale.
        sizes: at which the even cut divides such a unit.
        threads: public issues about it.
    """

    model: str
    what: str
    width: int
    unit: int
    sizes: tuple[int, ...]
    quantised: dict[str, Any]
    threads: str
    experts: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """A small model with that width in that format."""
        sizes: dict[str, Any] = {
            "hidden_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 16,
            "num_hidden_layers": 1,
            "vocab_size": 512,
            "quantization_config": self.quantised,
        }
        if not self.experts:
            return make_config("llama", **sizes, intermediate_size=self.width)
        return make_config("qwen3_moe", **sizes, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=self.width)

    def cuts(self, tp_size: int, *, even: bool) -> tuple[Range, ...]:
        """Each rank's range of the width."""
        config = ModelConfig.from_dict(self.config, cutting=Cutting(1, even))
        mlp = config.blueprint.layers[0].parts[-1]
        assert isinstance(mlp, Experts | Gated)
        return mlp.down.input_cut.ranges(self.width, tp_size)

    def check(self, tp_size: int, folder: Path) -> SizeCheck:
        """What ``plan`` says of it."""
        (folder / "config.json").write_text(json.dumps(self.config))
        return plan_model(read_metadata(str(folder)), Budget()).checks[tp_size - 1]


ROWS = (
    Row("Qwen3-30B-A3B FP8", "experts", 768, 128, (4, 8), FP8, "vllm#25292, #44763"),
    Row("Qwen3.5-35B-A3B FP8", "shared expert", 512, 128, (8,), FP8, "vllm#52997", experts=False),
    Row("Qwen3.8-Flash-Next FP8", "experts", 640, 128, (2, 4, 8), FP8, "vllm#54178"),
    Row("Qwen3-235B-A22B FP8 and MiniMax-M2", "experts", 1536, 128, (8,), FP8, "vllm#39046, #48173"),
    Row("GLM-4.5-Air in such blocks", "experts", 1408, 128, (2, 4, 8), FP8, ""),
    Row("Gemma-4-26B-A4B in such blocks", "experts", 704, 128, (2, 4, 8), FP8, ""),
    Row("Nemotron-3-Nano NVFP4", "experts", 1856, 16, (8,), NVFP4, "vllm#49949"),
    Row("Qwen2.5-72B AWQ", "MLP", 29568, 128, (2, 4, 8), AWQ, "vllm#21695", experts=False),
)
CASES = [(row, tp_size) for row in ROWS for tp_size in row.sizes]
IDS = [f"{row.model} tp {tp_size}" for row, tp_size in CASES]


def widths(cuts: Sequence[Range]) -> str:
    """``"2 x 256, 2 x 128"``."""
    return ", ".join(f"{len(list(group))} x {width}" for width, group in groupby(len(held) for held in cuts))


def slower(cuts: Sequence[Range]) -> float:
    """The widest share over the mean, less one."""
    return max(len(held) for held in cuts) * len(cuts) / cuts[-1].stop - 1


def divided(row: Row, cuts: Sequence[Range]) -> int:
    """Borders inside of a unit, whose scale is on both sides then."""
    return sum(held.start % row.unit > 0 for held in cuts)


def answer(objections: Sequence[Objection]) -> tuple[str, str]:
    """Whether an engine loads it; and where that is from."""
    refused = [one for one in objections if not one.loads] or list(objections)
    if not refused:
        return "loads", ""
    first = refused[0]
    source = first.source.split(";")[0].replace(".py:", ":").replace("/", ".")  # modules, not files of this repository
    where = re.sub(r"\w+\.", "", source)
    return f"{f'loads, {first.rule}' if first.loads else 'refuses'} ({where})", source


def line(row: Row, tp_size: int, check: SizeCheck) -> str:
    usual, even = row.cuts(tp_size, even=False), row.cuts(tp_size, even=True)
    cells = (
        f"{row.model}, {row.what}" + (f" ({row.threads})" if row.threads else ""),
        f"{row.width} = {row.width / row.unit:g} x {row.unit}",
        str(tp_size),
        _cell(row, usual),
        "the same" if even == usual else _cell(row, even),
        answer(check.vllm)[0],
        answer(check.sglang)[0],
    )
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, cuts: Sequence[Range]) -> str:
    more = [f"{slower(cuts):.1%} slower"] if slower(cuts) else []
    inside = divided(row, cuts)
    return "; ".join([widths(cuts), *more, *([f"{counted(inside, 'border')} in blocks"] if inside else [])])


def page() -> str:
    lines = [
        "# Where even cuts fail",
        "",
        "Published checkpoints have one scale for a block, or a group, of weights. At some sizes an even share of the",
        "inner size of an MLP ends inside of one. tpctl puts the border where the block ends, and the shares are then",
        "uneven; or, with `--even` and where there are fewer blocks than ranks, lets the border divide the block,",
        "whose scale both sides have. No value changes either way.",
        "",
        "What other engines do with the published checkpoint is read from their released code. `tpctl plan MODEL` says",
        "the same of any model, at every size, from headers alone. The table is made and checked by",
        "`tests/unit/test_uneven_cuts.py`, which also cuts MLPs of these sizes, verifies the shards, and merges them",
        "into the same bytes again.",
        "",
        "| model | inner size | tp | tpctl, ranks x width | with `--even` | vLLM 0.33.0 | SGLang 0.5.23 |",
        "|---|---|---|---|---|---|---|",
    ]
    sources: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for row, tp_size in CASES:
            check = row.check(tp_size, Path(folder))
            lines.append(line(row, tp_size, check))
            sources |= {one for made in (check.vllm, check.sglang) for one in answer(made)[1].split(", ") if one}
    lines += ["", "Modules of the wheels, and lines in them:", "", *(f"- `{one}`" for one in sorted(sources))]
    return "\n".join(lines) + "\n"


def test_the_page_says_what_plan_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(("row", "tp_size"), CASES, ids=IDS)
@pytest.mark.parametrize("even", [False, True], ids=["blocks", "even"])
def test_it_is_cut_proven_and_merged(tmp_path: Path, row: Row, tp_size: int, even: bool) -> None:
    source = make_checkpoint(tmp_path / "source", row.config)
    shard_checkpoint(source, tmp_path / "cut", tp_size, cutting=Cutting(1, even))
    verified = inspect_shards(tmp_path / "cut", verify=True, source=source).verified
    assert verified is not None and verified.compared_bytes == verified.hashed_bytes
    merge_shards(tmp_path / "cut", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


@pytest.mark.parametrize(("row", "tp_size"), CASES, ids=IDS)
def test_an_even_share_ends_inside_of_a_unit(row: Row, tp_size: int) -> None:
    assert row.width % tp_size or row.width // tp_size % row.unit
    cuts = row.cuts(tp_size, even=False)
    assert divided(row, cuts) == 0 or row.width / row.unit < tp_size


if __name__ == "__main__":
    print(page(), end="")
