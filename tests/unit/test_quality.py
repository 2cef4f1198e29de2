"""``tpctl bench quality``: windows, perplexity and divergence beside transformers and torch, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tests.unit.fake_client import write_tokenizer
from tests.unit.quality_runs import TEXT, InProcess
from tests.unit.quality_runs import made as made
from tests.unit.quality_runs import run as run
from tpctl.bench.passage import PASSAGE
from tpctl.bench.quality import Distribution
from tpctl.bench.windows import Windows
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import (
    CheckpointError,
    EngineError,
    OutputError,
    RequestError,
    SourceError,
    TpctlError,
    UsageError,
)
from tpctl.wire.messages import Output
from tpctl.wire.scoring import TokenScore


@given(count=st.integers(2, 60), prefix=st.integers(0, 2), context=st.integers(2, 20), stride=st.integers(1, 20))
def test_each_token_is_scored_once_with_what_stands_before(count: int, prefix: int, context: int, stride: int) -> None:
    text, before = list(range(100, 100 + count)), [7] * prefix
    try:
        windows = Windows(before, text, context, stride)
    except UsageError:
        assert stride > context - prefix - (not prefix)
        return
    scored: list[int] = []
    for number, window in enumerate(windows):
        assert window.row == len(scored)
        assert len(window.token_ids) <= context
        assert window.token_ids[:prefix] == before
        begin = number * stride
        assert window.token_ids[prefix:] == text[begin : begin + context - prefix]
        assert window.first >= 1
        scored += window.token_ids[window.first :]
    assert scored == (text if prefix else text[1:])
    assert windows.count == len(scored)


@pytest.mark.parametrize(("count", "prefix"), [(0, 0), (1, 0), (0, 1)])
def test_a_text_without_anything_to_score_is_refused(count: int, prefix: int) -> None:
    with pytest.raises(RequestError, match=f"the text has {count} tokens, of which none stands behind another"):
        Windows([1] * prefix, [5] * count, 10, 5)


def test_statistics_are_over_all_values() -> None:
    assert Distribution.of([float(value) for value in range(200, 0, -1)]) == Distribution(100.5, 100.5, 198.0, 200.0)
    assert Distribution.of([1.0, 4.0, 1.5]) == Distribution(6.5 / 3, 1.5, 4.0, 4.0)
    assert Distribution.of([2.0]) == Distribution(2.0, 2.0, 2.0, 2.0)


def transformers_loop(made: dict[str, Any], name: str, context: int, stride: int) -> list[torch.Tensor]:
    """Distributions at each scored token, as the documentation of transformers goes through a text."""
    ids = Tokenizer(made["folder"] / name).encode(TEXT)
    found, done = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        with torch.no_grad():
            logits = made[name](torch.tensor([ids[begin:end]])).logits[0].double()
        found += list(logits.log_softmax(-1)[done - 1 - begin : end - 1 - begin])
        done = end
        if end == len(ids):
            break
    return found


def perplexity(made: dict[str, Any], rows: list[torch.Tensor]) -> float:
    ids = Tokenizer(made["folder"] / "whole").encode(TEXT)
    return math.exp(-sum(float(row[id]) for row, id in zip(rows, ids[1:], strict=True)) / (len(ids) - 1))


@pytest.mark.parametrize(("context", "stride"), [(64, 16), (127, 63), (20, 19)])
def test_perplexity_is_that_of_a_transformers_loop(
    run: Callable[..., Any], made: dict[str, Any], context: int, stride: int
) -> None:
    report = run(f"whole --context {context} --stride {stride} --max-num-seqs 2 --max-num-batched-tokens 50 --json")
    wanted = perplexity(made, transformers_loop(made, "whole", context, stride))
    assert report["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert report["tokens"] == len(TEXT.encode()) - 1
    assert report["settings"] == {"text": "text", "context": context, "stride": stride, "tokens": None}
    assert "divergence" not in report
    assert InProcess.most_open <= 4  # so that what waits does not grow with the text


def test_divergence_is_torchs(run: Callable[..., Any], made: dict[str, Any]) -> None:
    report = run("rounded --against whole --context 64 --stride 16 --json")
    p, q = (torch.stack(transformers_loop(made, name, 64, 16)) for name in ("whole", "rounded"))
    wanted = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    found = report["divergence"]
    assert found["mean"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert found["median"] == pytest.approx(float(wanted.quantile(0.5)), rel=1e-4)
    assert found["p99"] == pytest.approx(float(wanted.sort().values[math.ceil(0.99 * len(wanted)) - 1]), rel=1e-4)
    assert found["max"] == pytest.approx(float(wanted.max()), rel=1e-4)
    assert report["same_top"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < report["same_top"] < 1
    assert report["perplexity"] == pytest.approx(perplexity(made, list(q)), rel=1e-4)
    assert report["against_perplexity"] == pytest.approx(perplexity(made, list(p)), rel=1e-4)


def test_a_model_beside_itself_and_in_another_dtype(run: Callable[..., Any]) -> None:
    same = run("whole --against whole --json")
    assert (same["divergence"], same["same_top"]) == ({"mean": 0, "median": 0, "p99": 0, "max": 0}, 1.0)
    half = run("whole --dtype bfloat16 --against-dtype float32 --tokens 90 --json")
    assert (half["engine"]["dtype"], half["against_engine"]["dtype"]) == ("bfloat16", "float32")
    assert 0 < half["divergence"]["mean"] < 0.01
    assert half["tokens"] == 89
    kept = run("whole --kv-cache-dtype fp8 --against-kv-cache-dtype model --tokens 90 --json")
    assert (kept["engine"]["kv_cache_dtype"], kept["against_engine"]["kv_cache_dtype"]) == ("fp8", "float32")
    assert 0 < kept["divergence"]["mean"] < 0.01


def test_a_bos_stands_before_every_window(run: Callable[..., Any], made: dict[str, Any]) -> None:
    model = made["folder"] / "begins"
    shutil.copytree(made["folder"] / "whole", model)
    tokenizer = Tokenizer(model)
    bos = tokenizer.backend.token_to_id("</s>")
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair=None, special_tokens=[("</s>", bos)]
    )
    tokenizer.backend.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>"}))
    report = run("begins --context 33 --stride 16 --json")
    ids, chosen, done = Tokenizer(made["folder"] / "whole").encode(TEXT), [], 0
    for begin in range(0, len(ids), 16):
        end = min(begin + 32, len(ids))
        with torch.no_grad():
            rows = made["whole"](torch.tensor([[bos, *ids[begin:end]]])).logits[0].double().log_softmax(-1)
        chosen += [float(rows[at - begin, ids[at]]) for at in range(done, end)]
        done = end
        if end == len(ids):
            break
    assert report["tokens"] == len(ids) == len(chosen)
    assert report["perplexity"] == pytest.approx(math.exp(-sum(chosen) / len(chosen)), rel=1e-4)


def test_the_table(run: Callable[..., Any]) -> None:
    shown = run("rounded --against whole --tokens 100", text=None).splitlines()
    assert shown[0] == "99 tokens of the package's own text, windows of 127, stride 63"
    assert [line.split() for line in shown[1:4]] == [
        ["tp", "dtype", "KV", "cache", "perplexity"],
        ["rounded", "1", "float32", "float32", shown[2].split()[-1]],
        ["against", "whole", "1", "float32", "float32", shown[3].split()[-1]],
    ]
    assert shown[4].split() == ["mean", "median", "99th", "percentile", "max"]
    assert shown[5].split()[:2] == ["KL,", "nats"]
    assert shown[6].startswith("the same likeliest token at ")


def test_the_packages_text_has_many_tokens() -> None:
    assert len(PASSAGE.split()) > 1000
    assert PASSAGE.isascii()


def other_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, special=["<other>"])


def other_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 301}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_tokenizer, "whole and changed cannot be compared: their tokenizers differ, for one at the token id 257"),
        (other_size, "whole and changed cannot be compared: the one knows 300 tokens, the other 301"),
    ],
)
def test_models_of_different_tokens_are_refused(
    change: Callable[[Path], None], said: str, run: Callable[..., Any], made: dict[str, Any]
) -> None:
    changed = made["folder"] / "changed"
    shutil.copytree(made["folder"] / "whole", changed)
    try:
        change(changed)
        with pytest.raises(CheckpointError, match=said):
            run("whole --against changed")
    finally:
        shutil.rmtree(changed)


@pytest.mark.parametrize(
    ("line", "text", "kind", "said"),
    [
        ("whole", "nowhere", SourceError, "cannot read nowhere: No such file or directory"),
        ("whole", "latin", SourceError, r"latin is not UTF-8 \(byte 4\); convert it"),
        ("whole", "empty", RequestError, "the text has 0 tokens, of which none stands behind another"),
        (
            "whole --context 128",
            "text",
            UsageError,
            "--context 128 is more than 127, one less than the limit of whole",
        ),
        ("whole --context 60 --max-model-len 60", "text", UsageError, "more than 59, one less than --max-model-len"),
        ("whole --context 60 --stride 60", "text", UsageError, "--stride 60 is not between 1 and 59"),
        ("nowhere", "text", TpctlError, "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    line: str, text: str, kind: type[TpctlError], said: str, run: Callable[..., Any]
) -> None:
    Path("latin").write_bytes(b"caf\xe9")
    Path("empty").write_bytes(b"")
    with pytest.raises(kind, match=said):
        run(line, text=text)


def test_a_text_that_is_too_long_is_refused(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpctl.cli.quality._MOST_TEXT", 20)
    with pytest.raises(SourceError, match=f"text has {len(TEXT.encode())} bytes, but a text at most 20"):
        run("whole")


def test_distributions_that_the_disk_cannot_hold_are_refused(
    run: Callable[..., Any], made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(made["folder"])._replace(free=1000)
    monkeypatch.setattr("tpctl.bench.quality.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match=r"of 9 tokens over 300 take 10\.8 kB, but the disk of .* has 1\.0 kB free"):
        run("whole --against whole --tokens 10")


def test_what_is_not_finite_is_no_figure(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(self: InProcess) -> list[Output]:
        return [Output("0", [1], "length", scores=[TokenScore(-1.0), TokenScore(math.nan)])]

    monkeypatch.setattr(InProcess, "outputs", outputs)
    with pytest.raises(EngineError, match="what the model makes of token 1 is not finite"):
        run("whole --tokens 10")
    monkeypatch.setattr(InProcess, "outputs", lambda self: [Output("0", [], "error", "the logits are not finite")])
    with pytest.raises(RequestError, match="the logits are not finite"):
        run("whole --tokens 10")
