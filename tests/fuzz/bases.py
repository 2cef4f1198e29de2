"""What is right before a case makes it wrong: small checkpoints of every family, shards of one, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.fake_client import write_tokenizer
from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.arch.families import FAMILIES
from tpctl.arch.quantised import Cutting
from tpctl.sharding.cutting.shard import shard_checkpoint

VOCAB = 264
SHARDS, EXPERTS, INDEXED, WORDS = "shards", "experts", "indexed", "words"
"""Bases beside the families: a checkpoint with its shards, the same of FP8 experts that are dealt to its ranks, one in
two files, one whose tokenizer is sentencepiece's."""

FEW_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}

TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{ '<<' + messages[0]['content'] | trim + '>>\\n' }}{% endif %}\n"
    "{%- for message in messages if message.role != 'system' %}\n"
    "{%- set mark = {'user': 'U', 'assistant': 'A'}[message.role] %}\n"
    "{{- mark ~ ': ' ~ message.content ~ eos_token }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
GENERATION: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": [256, 2],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 40,
    "transformers_version": "5.0.0",
}
LINES = (
    b'{"prompt": "Once upon"}\n'
    b'{"id": "q", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3, "temperature": 0.5, "seed": 1}\n'
    b'{"id": 9, "prompt": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab <s> x", "stop": ["z"], "top_k": 5, "logprobs": 1}\n'
)


def config_of(base: str) -> dict[str, Any]:
    """The ``config.json`` of a base."""
    family = "qwen3_moe" if base == EXPERTS else base if base in FAMILIES else "llama"
    more = FEW_EXPERTS if family == "qwen3_moe" else {}
    if base == EXPERTS:
        more = {**more, "quantization_config": FP8}
    return make_config(family, **more, vocab_size=VOCAB, eos_token_id=256, bos_token_id=None)


def make_bases(folder: Path) -> None:
    """Write every base below ``folder``, each as the folder that commands will run in."""
    for base in (*FAMILIES, SHARDS, EXPERTS, INDEXED, WORDS):
        make_base(folder / base, base)


def make_base(work: Path, base: str) -> None:
    """Write one base into ``work``."""
    model = make_checkpoint(work / "model", config_of(base), files=2 if base == INDEXED else 1)
    write_tokenizer(model, template=None)
    if base == WORDS:
        (model / "tokenizer.json").write_text(json.dumps(words_tokenizer()))
        (model / "tokenizer_config.json").write_text(json.dumps(WORDS_CONFIG))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    (work / "lines.jsonl").write_bytes(LINES)
    if base in (SHARDS, EXPERTS):
        cutting = Cutting(2) if base == EXPERTS else Cutting()
        shard_checkpoint(model, work / "shards", 2, source_id="model", cutting=cutting)


WORDS_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False}
    | {"rstrip": False, "single_word": False, "special": True},
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "added_tokens_decoder": {"263": {"content": "<end>", "special": True, "lstrip": False, "rstrip": False}},
    "clean_up_tokenization_spaces": False,
    "model_max_length": 64,
    "tokenizer_class": "LlamaTokenizer",
}


def words_tokenizer() -> dict[str, Any]:
    """A tokenizer as sentencepiece's are converted: spaces marked, bytes for what is unknown, a BOS in front."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "▁a", "▁x"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": pieces[id], "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for id in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": [["▁", "a"]],
        },
    }
