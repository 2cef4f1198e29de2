"""The conversion of a GGUF file, against the transformers model that it was written from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tpctl.checkpoint.gguf import _llama3_divisors, convert_gguf
from tpctl.checkpoint.safetensors import read_header
from tpctl.errors import SourceError
from tpctl.models.config import ModelConfig

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS, THETA = 32, 4, 2, 8, 48, 2, 500000.0
TOKENS = ["<|im_start|>", "<|im_end|>", *(chr(33 + index) for index in range(90)), "Ġ", "cd", "ab"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
RULE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a query or key weight's rows: each head's two halves interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, divisors: list[float] | None) -> dict[str, np.ndarray]:
    """A tiny Llama in GGUF; returns its weights under their Hugging Face names."""
    import gguf

    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        # Values that bfloat16 holds exactly, so that the comparison can be exact.
        return (rng.integers(-64, 64, shape) / 64).astype(np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    weights = {"model.embed_tokens.weight": random(len(TOKENS), HIDDEN)}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    weights["model.norm.weight"] = random(HIDDEN)
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    weights["lm_head.weight"] = random(len(TOKENS), HIDDEN)
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(LAYERS):
        names = {
            "attn_norm": ("input_layernorm", (HIDDEN,)),
            "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
            "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
            "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
            "ffn_gate": ("mlp.gate_proj", (WIDTH, HIDDEN)),
            "ffn_up": ("mlp.up_proj", (WIDTH, HIDDEN)),
            "ffn_down": ("mlp.down_proj", (HIDDEN, WIDTH)),
        }
        for name, (target, shape) in names.items():
            weight = weights[f"model.layers.{layer}.{target}.weight"] = random(*shape)
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            writer.add_tensor(f"blk.{layer}.{name}.weight", permuted(weight, heads) if heads else weight)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.slow
def test_weights_config_tokenizer_and_template_survive(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    divisors = _llama3_divisors(HEAD_DIM // 2, THETA, 8192, **RULE)
    assert 1.0 in divisors and 8.0 in divisors
    weights = write_gguf(tmp_path / "tiny.gguf", divisors)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    header = read_header(path)
    assert set(header.tensors) == set(weights)
    data = path.read_bytes()
    for name, expected in weights.items():
        info = header.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", expected.shape)
        stored = np.frombuffer(data[info.start : info.stop], dtype=np.uint16).astype(np.uint32) << 16
        np.testing.assert_array_equal(stored.view(np.float32).reshape(expected.shape), expected, err_msg=name)
    config = ModelConfig.load(tmp_path / "out")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.rope.kind, config.rope.theta) == ("llama3", THETA)
    assert config.rope.original_max_position_embeddings == 8192
    assert {key: config.rope.params[key] for key in RULE} == RULE
    assert config.eos_token_ids == (1,)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert (tmp_path / "out" / "generation_config.json").is_file()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>ab").ids == [1, len(TOKENS) - 1]


@pytest.mark.parametrize(
    ("divisors", "cut", "said"),
    [
        ([1.0, 2.0, 7.0, 3.0], 0, "its RoPE divisors follow no known rule"),
        (None, 5000, "damaged or cut short"),
    ],
)
def test_files_that_cannot_be_converted(tmp_path: Path, divisors: list[float] | None, cut: int, said: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, divisors)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError) as caught:
        convert_gguf(path, tmp_path / "out")
    assert str(caught.value).startswith(f"cannot convert {path}: ") and said in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_llama3_divisors_follow_the_published_rule() -> None:
    # Llama 3.1 8B: head size 128, theta 500000; the values of transformers' _compute_llama3_parameters.
    divisors = _llama3_divisors(64, 500000.0, 8192, **RULE)
    assert divisors[0] == 1.0 and divisors[-1] == 8.0
    wavelength = 2 * math.pi * 500000.0 ** (30 / 64)
    smooth = (8192 / wavelength - 1.0) / 3.0
    assert divisors[30] == pytest.approx(1 / ((1 - smooth) / 8 + smooth))
