"""Fields of a config that nothing has read."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.bench.shapes import SHAPES, shape_fields
from tpctl.errors import UnsupportedModelError

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mystery_scale", 2.0), ("attn_scale", 3.0), ("layer_scale", 0.1), ("layer_scales", [1.0, 0.5])),
        *(("rope_interleave", True), ("use_mrope", True), ("rotary_base", 10000), ("use_xrope", True)),
        *(("attention_sink_bias", True), ("attention_type", "linear"), ("q_norm", True), ("num_kv_heads", 4)),
        *(("mlp_gate_limit", 7.0), ("kv_window_sizes", {"0": 128}), ("lm_head_bias", True), ("residual_factor", 0.5)),
        *(("mystery", 2.0), ("mystery", {"scale": 2.0}), ("mystery", {"deep": [{"a": 3}]}), ("mystery", {"on": True})),
        *(("mystery", {"attn_kind": "linear"}), ("mystery", [1, 2]), ("softmax_offset", 1.0), ("weight_offset", 1.0)),
        *(("embedding_mult", 12), ("post_block_shift", 0.5), ("use_mystery", True), ("nope_layer_interval", 4)),
        *(("share_layers", 2), ("tie_layers", True), ("mystery_layers", [1, 2]), ("hidden_act2", "gelu")),
        *(("adapter_config", {"alpha": 2.0}), ("num_layers", 3), ("experts_per_token", 2), ("batch_norm", True)),
        *(
            ("logit_clipping", 5.0),
            ("recurrent_steps", 4),
            ("layer_types_of", ["linear"]),
            ("position_embedding_type", "alibi"),
        ),
    ],
)
def test_what_is_about_computing_is_refused(key: str, value: Any) -> None:
    raw = make_config(**{key: value})
    with pytest.raises(UnsupportedModelError) as refused:
        ModelConfig.from_dict(raw)
    assert str(refused.value) == (
        f"config.json: {key} is {json.dumps(value)}, which tpctl does not know of LlamaForCausalLM; left out, it could "
        "change every result. Correct model_type, or remove the field if it has no meaning"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"mystery_scale": 1.0, "layer_scales": [1.0, 1], "attention_sink_bias": False, "attn_caps": None},
        {"rope_interleaved": False, "lm_head_bias": False, "head_windows": [], "gate_limits": {"0": None}},
        {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "layerdrop": 0.2, "attn_init_std": 0.1},
        {"output_attentions": True, "output_router_logits": True, "router_aux_loss_coef": 0.001, "moe_z_loss": 0.1},
        {"_attn_implementation": "eager", "attn_implementation": "sdpa", "use_flash_attn": True},
        {"pretraining_tp": 2, "unsloth_fixed": True, "is_llama_config": True, "initializer_range": 0.5, "mlp_units": 3},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "ffn_dim_multiplier": 1.3},
        {"mystery": {"scale": 1.0, "on": False, "of": None, "said": "so", "lr": 0.1}, "mysteries": [], "odd": 1.0},
        {"use_mystery": False, "share_layers": 0, "hidden_act2": None, "num_layers": 2, "n_layer": 2, "num_labels": 2},
        {"learning_rate": 2e-5, "weight_decay": 0.1, "warmup_ratio": 0.03, "adam_epsilon": 1e-8, "seed": 42},
        {
            "num_train_epochs": 3.0,
            "train_batch_size": 8,
            "training_args": {"lr": 0.1, "layers": [1, 2]},
            "eval_loss": 1.5,
        },
        {"max_grad_norm": None, "label_smoothing": 0.1, "gradient_clipping": 1.5, "max_steps": 1000, "sft_lr": 0.5},
        {"typical_p": 0.9, "length_penalty": 1.2, "epsilon_cutoff": 0.1, "generation_config": {"top_k": 5, "p": 0.5}},
        {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "suppress_tokens": [1, 2]},
        {"bad_words_ids": [[1, 2]], "forced_decoder_ids": [[1, 2]], "stop_token_ids": [1, 2], "image_token_index": 5},
        {"use_flash_attention_2": True, "use_fused_rms_norm": True, "use_bfloat16": True, "use_liger_kernel": True},
        {"use_cache_quantization": True, "use_cache_kernel": True, "use_return_dict": True, "use_fast_tokenizer": True},
        {
            "id2label": {"0": "A"},
            "label2id": {"A": 1},
            "unsloth_version": "2025.1",
            "_name": 1.5,
            "config_version": 1.5,
        },
        {"vision_config": {"num_layers": 5}, "mm_hidden_size": 1024, "mlp_ratio": 4.0, "embedding_size": 512},
        {"gradient_checkpointing": True, "attention_softmax_in_fp32": True, "lm_head_dtype": "float32"},
        {"layer_types": None, "max_sequence_length": 2048, "context_window_size": 768, "model_params": 7.6},
        {"transformers.js_config": {"use_external_data_format": {"model.onnx": 1, "layers": True}}},
        {"num_mtp_modules": 1, "num_nextn_predict_layers": 1, "position_embedding_type": "rope", "release_date": 2.5},
        {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "auto_map": {"AutoModel": "a.B"}},
    ],
)
def test_what_says_nothing_passes(fields: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(make_config(**fields)) == ModelConfig.from_dict(make_config())


PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere2": {
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "rotary_pct": 1.0,
        "position_embedding_type": "rope_gptj",
        "cache_implementation": "hybrid",
        **dict.fromkeys(
            ("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding"), True
        ),
    },
    "gemma2": {"cache_implementation": "hybrid", "sliding_window_size": 4096},
    "gemma3_text": {"cache_implementation": "hybrid", "_sliding_window_pattern": 6, "attn_logit_softcapping": None},
    "minimax_m2": {
        "attn_type_list": [1] * 62,
        "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1,
        "use_mtp": True,
        **{f"layernorm_{name}_beta": 1.0 for name in ("full_attention", "linear_attention", "mlp")},
        "swa_rope_theta": -1.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "qk_norm_type": "per_layer",
        "use_qk_norm": True,
        "use_routing_bias": True,
        "router_jitter_noise": 0.0,
    },
    "gemma4_text": {"top_k_experts": 8, "num_experts": 128, "moe_intermediate_size": 704},
    "deepseek_v3": {"ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "qk_head_dim": 192},
    "gpt_oss": {"experts_per_token": 4, "initial_context_length": 4096, "output_router_logits": False},
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "resid_pdrop": 0.0},
    "qwen2": {"use_mrope": False, "max_window_layers": 28, "use_sliding_window": False},
    "qwen3_moe": {"router_aux_loss_coef": 0.001, "output_router_logits": False, "norm_topk_prob": True},
    "smollm3": {"pretraining_tp": 2, "max_window_layers": 28, "use_sliding_window": False},
}
"""What published files have besides what the family's class in transformers defines."""


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_what_published_files_have_passes(family: str) -> None:
    ModelConfig.from_dict({"model_type": family, **PUBLISHED[family]})


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block is false, but Cohere2ForCausalLM knows true al"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, r"attn_type_list is \[1, 0\], but MiniMaxM2ForCausalLM knows 1 al"),
        ("deepseek_v3", {"qk_head_dim": 128}, "qk_head_dim is 128, but 192, which qk_nope_head_dim and"),
        ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method is "greedy", but DeepseekV3ForCausalLM knows "noaux'),
        ("gpt_oss", {"num_experts_per_tok": 4, "experts_per_token": 2}, "experts_per_token, which is the same, is 2"),
        ("gemma2", {"sliding_window": 4096, "sliding_window_size": 64}, "sliding_window_size, which is the same, is"),
    ],
)
def test_and_says_there_what_is_known(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ModelConfig.from_dict({"model_type": family, **fields})


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_of_known_models_pass(name: str) -> None:
    ModelConfig.from_dict(shape_fields(name))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_released_mixtures_pass(path: Path) -> None:
    ModelConfig.from_dict(json.loads(path.read_text()))


def classes() -> Iterator[tuple[str, Any]]:
    """The configuration class of each text model, of which transformers has one."""
    from transformers import CONFIG_MAPPING

    for kind, family in sorted(FAMILIES.items()):
        if kind in CONFIG_MAPPING and family.inner is None:
            yield kind, CONFIG_MAPPING[kind]


NO_ANSWER = {
    *("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise", "initializer_range"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "return_dict"),
    *("use_cache", "pad_token_id", "pretraining_tp", "problem_type", "chunk_size_feed_forward"),
}
"""Fields that transformers' modelling code reads in training, or for what it gives back besides logits."""

OFF = {
    *((kind, "sliding_window") for kind in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")),
    *(("gemma4_text", key) for key in ("num_experts", "moe_intermediate_size", "top_k_experts")),
    ("phi3", "original_max_position_embeddings"),
}
"""Fields that another one switches off by default: ``use_sliding_window``, ``enable_moe_block``, a RoPE of no kind that
is stretched."""


def test_what_transformers_reads_is_known_or_refused() -> None:
    """Each family's class as it is by default passes; and of its fields no other value of one that the modelling code
    computes with is left unread."""
    checked, loose = 0, set()
    for kind, made in classes():
        defaults = json.loads(made().to_json_string(use_diff=False))
        raw = {**defaults, "model_type": kind, "architectures": [FAMILIES[kind].architecture]}
        if raw.get("head_dim") is None and raw["hidden_size"] % raw["num_attention_heads"]:
            raw["head_dim"] = 128  # GLM-4.5's own default leaves it to who can divide
        plain = ModelConfig.from_dict(raw)
        code = inspect.getsource(importlib.import_module(made.__module__.replace("configuration_", "modeling_")))
        used = set(re.findall(r"config\.(\w+)", code)) | set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', code))
        for key in sorted(defaults.keys() & used - NO_ANSWER):
            for value in (0.375, 3, True, False, "other"):
                if value == raw[key]:
                    continue
                try:
                    found = ModelConfig.from_dict({**raw, key: value})
                except Exception:  # refused, or of a wrong kind
                    break
                if found != plain:
                    break
            else:
                loose.add((kind, key))
            checked += 1
    assert loose == OFF
    assert checked > 300
