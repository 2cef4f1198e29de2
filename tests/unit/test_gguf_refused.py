"""GGUF files that are refused: by name, in one line, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.gguf_files import (
    HIDDEN,
    LONG,
    SHORT,
    TOKENS,
    config_keys,
    floats,
    tiny_config,
    tokenizer_keys,
    write_file,
    write_gguf,
)
from tpctl.checkpoint.gguf import convert_gguf
from tpctl.errors import SourceError


def refusal(path: Path) -> str:
    """Why ``path`` is not converted; nothing may be left of the attempt."""
    folder = path.with_name("refused")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with pytest.raises(SourceError) as caught:
        convert_gguf(path, folder)
    assert not list(folder.iterdir())
    text = str(caught.value)
    assert text.startswith(f"cannot convert {path}: ") and "\n" not in text
    return text.removeprefix(f"cannot convert {path}: ")


LACKING = "of the 21 tensors of its architecture; download it again"


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [
        (["blk.1.ffn_down.weight"], {}, f"it lacks 1 (blk.1.ffn_down.weight) {LACKING}"),
        (
            ["output_norm.weight", "blk.0.attn_q.weight"],
            {},
            f"it lacks 2 (blk.0.attn_q.weight, output_norm.weight) {LACKING}",
        ),
        (
            ["blk.1.ffn_down.weight"],
            {"blk.1.ffn_dwn.weight": floats(1)},
            f"it lacks 1 (blk.1.ffn_down.weight) {LACKING}",
        ),
        (
            [],
            {"blk.0.attn_sinks.weight": floats(1, 2)},
            "it holds 1 (blk.0.attn_sinks.weight) tensors that have no place",
        ),
        ([], {"output.bias": floats(1, 2)}, "it holds 1 (output.bias) tensors that have no place"),
        ([], {"blk.2.attn_norm.weight": floats(1)}, "it holds 1 (blk.2.attn_norm.weight) tensors that have no place"),
        (
            [],
            {"blk.0.attn_q.bias": floats(1)},
            "it lacks 7 (blk.0.attn_output.bias, blk.0.attn_k.bias, blk.0.attn_v.bias, …)",
        ),
        (
            [],
            {"output_norm.weight": floats(1, 2)},
            "tensor output_norm.weight is of shape [2], but its settings make it [32]",
        ),
        (
            [],
            {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 4), np.float32), "blk.0.ffn_gate_inp.weight": floats(1)},
            "it is a mixture of experts (2 tensors as blk.0.ffn_gate_exps.weight)",
        ),
        (
            [],
            {"blk.0.ffn_gate.7.weight": floats(1)},
            "it is a mixture of experts (1 tensors as blk.0.ffn_gate.7.weight)",
        ),
        ([], {"output.weight": np.full((len(TOKENS), HIDDEN), np.nan, np.float32)}, "holds values that are not finite"),
        ([], {"output.weight": np.full((len(TOKENS), HIDDEN), 3.4e38, np.float32)}, "holds values that are not finite"),
    ],
)
def test_tensors_that_are_missing_or_have_no_place(
    tmp_path: Path, drop: list[str], add: dict[str, np.ndarray], said: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", drop=drop, add=add)
    if "finite" in said:  # told only when the values are read; the caller throws the folder away
        with pytest.raises(SourceError, match=said):
            convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    else:
        assert said in refusal(tmp_path / "tiny.gguf")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_file(tmp_path / "vocab.gguf", {**config_keys(tiny_config()), **tokenizer_keys()}, {})
    assert "it holds no tensors" in refusal(tmp_path / "vocab.gguf")


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"general.architecture": "mamba2"}, "its architecture 'mamba2' is not supported; tpctl converts GGUF"),
    ("llama", {"general.architecture": None}, "it has no general.architecture"),
    ("llama", {"general.type": "adapter"}, "it is an adapter (LoRA), not a model"),
    ("llama", {"general.type": "mmproj"}, "it is of the type 'mmproj', not a model"),
    (
        "llama",
        {"llama.expert_count": 8, "llama.expert_used_count": 2},
        "a mixture of experts (llama.expert_count is 8)",
    ),
    ("llama", {"llama.block_count": None}, "it has no llama.block_count"),
    ("llama", {"llama.block_count": 3}, "it lacks 9 (blk.2.attn_norm.weight, "),
    ("llama", {"llama.block_count": 0}, "llama.block_count is 0, but a positive number is needed"),
    ("llama", {"llama.attention.head_count": "four"}, "llama.attention.head_count is 'four', but a whole number"),
    ("llama", {"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv differs between layers"),
    ("llama", {"llama.attention.value_length": 4}, "llama.attention.value_length is 4, which cannot be converted"),
    ("llama", {"llama.attention.layer_norm_rms_epsilon": None}, "it has no llama.attention.layer_norm_rms_epsilon"),
    ("llama", {"llama.attention.causal": False}, "llama.attention.causal is False"),
    ("llama", {"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
    ("llama", {"llama.logit_scale": 0.0625}, "llama.logit_scale is 0.0625"),
    ("llama", {"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0"),
    ("llama", {"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
    ("llama", {"llama.attention.temperature_scale": 0.1}, "settings that tpctl does not know (llama.attention.temper"),
    ("llama", {"llama.vocab_size": 12}, "llama.vocab_size is 12"),
    ("llama", {"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4 of heads of 8"),
    ("llama", {"llama.rope.dimension_count": 10}, "10 rotated dimensions do not form pairs within a head of 8"),
    ("llama", {"llama.rope.scaling.type": "ntk", "llama.rope.scaling.factor": 2.0}, "its RoPE scaling 'ntk' cannot be"),
    ("llama", {"llama.rope.scaling.type": "longrope"}, "its RoPE scaling 'longrope' cannot be converted"),
    ("llama", {"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor is 1.2"),
    ("llama", {"llama.rope.scaling.alpha": 1000.0}, "settings that tpctl does not know (llama.rope.scaling.alpha)"),
    ("qwen2", {"qwen2.attention.sliding_window": 16}, "which layers it applies to is not said"),
    ("qwen2", {"qwen2.pooling_type": 3}, "qwen2.pooling_type is 3"),
    ("phi3", {"phi3.attention.sliding_window": None}, "it has no phi3.attention.sliding_window"),
    ("phi3", {"phi3.rope.scaling.type": "linear", "phi3.rope.scaling.factor": 2.0}, "'linear' is none that Phi-3 has"),
    ("llama", {"tokenizer.ggml.model": "t5"}, "its tokenizer is of the kind 't5'"),
    ("llama", {"tokenizer.ggml.model": None}, "its tokenizer is of the kind 'none'"),
    ("llama", {"tokenizer.ggml.pre": "deepseek-llm"}, "splits text by the rule 'deepseek-llm', which cannot be"),
    ("llama", {"tokenizer.ggml.pre": "deepseek-coder"}, "splits text by the rule 'deepseek-coder', which cannot be"),
    ("llama", {"tokenizer.ggml.pre": None}, "it does not say how its tokenizer splits text (tokenizer.ggml.pre)"),
    ("llama", {"tokenizer.ggml.merges": None}, "it has no tokenizer.ggml.merges"),
    ("llama", {"tokenizer.ggml.merges": ["a b c"]}, "has the merge 'a b c', which is no pair"),
    ("llama", {"tokenizer.ggml.tokens": ["a", "b", "a"]}, "has the token 'a' twice"),
    ("llama", {"tokenizer.ggml.token_type": [1]}, f"tokenizer.ggml.token_type has 1 entries for {len(TOKENS)} tokens"),
    (
        "llama",
        {"tokenizer.ggml.eos_token_id": 500},
        f"tokenizer.ggml.eos_token_id is 500, but its tokenizer has {len(TOKENS)}",
    ),
    (
        "llama",
        {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
        "names no tokenizer.ggml.bos_token_id",
    ),
    ("llama", {"tokenizer.ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token is True"),
    ("llama", {"tokenizer.ggml.suppress_tokens": [1]}, "does not know (tokenizer.ggml.suppress_tokens)"),
    ("llama", {"tokenizer.chat_template": 7}, "tokenizer.chat_template is 7, but text is needed"),
]


@pytest.mark.parametrize(("family", "keys", "said"), UNSUPPORTED)
def test_settings_that_cannot_be_converted(tmp_path: Path, family: str, keys: dict[str, Any], said: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_config(family), keys=keys)
    assert said in refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            {"rope_factors_long.weight": floats(*LONG)},
            "it has rope_factors_long.weight but no rope_factors_short.weight",
        ),
        (
            {"rope_factors_long.weight": floats(*LONG), "rope_factors_short.weight": floats(*SHORT)},
            "it has long RoPE but no phi3.rope.scaling.attn_factor",
        ),
        (
            {"rope_factors_long.weight": floats(*LONG[:3]), "rope_factors_short.weight": floats(*SHORT)},
            "rope_factors_long.weight is F32 of shape [3], but F32 of [4] is needed",
        ),
        (
            {"rope_factors_long.weight": floats(*LONG), "rope_factors_short.weight": floats(0, 1, 1, 1)},
            "tensor rope_factors_short.weight holds numbers that no frequency can be divided by",
        ),
        ({"rope_freqs.weight": floats(1, 2, 7, 3)}, "its RoPE divisors follow no known rule"),
    ],
)
def test_rope_tensors_that_cannot_be_converted(tmp_path: Path, extra: dict[str, np.ndarray], said: str) -> None:
    keys: dict[str, Any] = {"phi3.rope.scaling.original_context_length": 16}
    if "attn_factor" not in said and "rope_freqs.weight" not in extra:
        keys["phi3.rope.scaling.attn_factor"] = 1.2
    write_gguf(tmp_path / "tiny.gguf", tiny_config("phi3"), keys=keys, add=extra)
    assert said in refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f(3).unlink(), "is one of 3 parts, and 1 of them are not beside it (tiny-00003-of-00003.gguf)"),
        (lambda f: f(2).rename(f(2).with_name("x.gguf")), "does not end in -00002-of-00003.gguf"),
        (lambda f: shutil.copy(f(1), f(2)), "tiny-00002-of-00003.gguf says that it is another part than its name"),
        (lambda f: f(3).write_bytes(f(3).read_bytes()[:-9]), "its part tiny-00003-of-00003.gguf cannot be used: the"),
        (lambda f: f(3).write_bytes(b"GG"), "its part tiny-00003-of-00003.gguf cannot be used: the"),
        (
            lambda f: write_file(f(3), {"split.no": 2, "split.count": 3}, {"blk.9.a": floats(1)}),
            "its parts hold 15 tensors instead of 21",
        ),
        (
            lambda f: write_file(f(3), {"split.no": 2, "split.count": 3}, {"blk.0.attn_k.weight": floats(1)}),
            "tensor blk.0.attn_k.weight is in tiny-0000",
        ),
        (
            lambda f: write_file(f(3), {"split.no": 2, "split.count": 3, "llama.block_count": 7}, {}),
            "is of another model than tiny-00001-of-00003.gguf: their llama.block_count differs",
        ),
        (
            lambda f: write_file(f(1), {"split.no": 5, "split.count": 3}, {}),
            "split.no 5 and split.count 3 do not go together",
        ),
    ],
)
def test_parts_that_do_not_make_a_model(tmp_path: Path, change: Any, said: str) -> None:
    def part(number: int) -> Path:
        return tmp_path / f"tiny-{number:05}-of-00003.gguf"

    write_gguf(tmp_path / "tiny.gguf", parts=3)
    change(part)
    named = tmp_path / "x.gguf" if (tmp_path / "x.gguf").exists() else part(1)
    assert said in refusal(named)


def test_a_disk_that_is_too_small_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=r"converting tiny.gguf needs .* KiB but .* has 1 B free"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
