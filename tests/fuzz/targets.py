"""What is made wrong: one strategy of cases for each kind of input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import fields, token_fields
from tests.fuzz.bases import (
    EXPERTS,
    GENERATION,
    INDEXED,
    SHARDS,
    TEMPLATE,
    WORDS,
    WORDS_CONFIG,
    config_of,
    words_tokenizer,
)
from tests.fuzz.case import Case, Change
from tests.fuzz.commands import BATCH, CHAT, PLAN, PROVE, Command, shard_and_prove
from tests.fuzz.headers import header_cases
from tests.fuzz.jsontext import seal
from tests.fuzz.lines import line_files
from tests.fuzz.mutations import Draw, broken_bytes, forms, json_files, json_values
from tests.fuzz.options import option_cases
from tests.fuzz.templates import template_texts
from tests.unit.synthetic import source_shapes
from tpctl.arch.families import FAMILIES


@st.composite
def config_cases(draw: Draw) -> Case:
    """``config.json`` and ``generation_config.json``, with the weights or, for ``plan``, without."""
    base = draw(st.sampled_from(sorted(FAMILIES)))
    changes = []
    if draw(st.integers(0, 4)):
        changes.append(draw(json_files("model/config.json", config_of(base), fields.config(base))))
    if not changes or not draw(st.integers(0, 4)):
        changes.append(draw(json_files("model/generation_config.json", GENERATION, fields.GENERATION)))
    way = draw(st.integers(0, 3))
    if way == 0:
        return Case("config", base, tuple(changes), shard_and_prove(draw(st.integers(1, 5))))
    if way == 1:
        return Case("config", base, tuple(changes), (CHAT,))
    if way == 2:
        return Case("config", base, tuple(changes), (("plan", "model"),))
    changes.append(Change("model/model.safetensors", "remove"))
    return Case("config", base, tuple(changes), (PLAN,))


@st.composite
def index_cases(draw: Draw) -> Case:
    """``model.safetensors.index.json``, and the files that it lists."""
    names = sorted(source_shapes(config_of(INDEXED)))
    files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: files[place % 2] for place, name in enumerate(source_shapes(config_of(INDEXED)))},
    }
    name = st.sampled_from([*files, "model.safetensors", *fields.FILE_NAMES])
    changes = []
    if draw(st.integers(0, 4)):
        if draw(st.booleans()):
            chosen = draw(st.sampled_from(names))
            index["weight_map"][chosen] = draw(name)
        changes.append(
            draw(json_files("model/model.safetensors.index.json", index, {"weight_map": fields.WEIGHT_MAPS}))
        )
    else:
        changes.append(draw(forms(f"model/{draw(st.sampled_from(files))}")))
    commands = draw(st.sampled_from([shard_and_prove(2), (PLAN,), (CHAT,)]))
    return Case("index", INDEXED, tuple(changes), commands)


@st.composite
def manifest_cases(draw: Draw) -> Case:
    """``tpctl.json`` of a shard folder, mostly with the digest that fits it, and the files that it names."""
    path, base = "shards/tpctl.json", draw(st.sampled_from([SHARDS, SHARDS, EXPERTS]))
    way = draw(st.integers(0, 9))
    if way == 0:
        change = draw(forms(f"shards/{draw(st.sampled_from(fields.SHARD_FILES))}"))
    elif way == 1:
        change = Change(
            f"shards/{draw(st.sampled_from(fields.SHARD_FILES))}", "flip", size=draw(st.integers(0, 1 << 20))
        )
    elif way == 2:
        change = draw(json_files(path, _manifest(base)))
    else:
        value, why = draw(json_values(_manifest(base), fields.MANIFEST, most=2))
        text = seal(value) if isinstance(value, dict) else json.dumps(None)
        change = Change(path, content=text.encode("utf-8", "surrogatepass"), why=why)
    commands = draw(st.sampled_from(MANIFEST_COMMANDS))
    return Case("manifest", base, (change,), commands)


# Where a manifest is not as it was, ``inspect-shards`` searches for the byte that changed, which takes a second.
MANIFEST_COMMANDS: list[tuple[Command, ...]] = [
    (("inspect-shards", "shards"), ("merge", "shards", "-o", "merged")),
    (("inspect-shards", "shards", "--verify", "--rank", "1"),),
    (("inspect-shards", "shards", "--json"),),
    *[(("merge", "shards", "-o", "merged"), ("inspect-shards", "shards", "--html", "page.html"))] * 4,
    *[(("reshard", "shards", "--tp", "3", "-o", "out"), *PROVE)] * 3,
    *[(("shard", "model", "--tp", "2", "--ranks", "0", "-o", "shards"),)] * 2,
    *[(("chat", "shards", "-m", "hi", "--seed", "1"), ("inspect-shards", "shards", "--verify"))] * 3,
    *[(("plan", "shards", "--json"),)] * 3,
]


@cache
def _manifest_text(base: str) -> str:
    import tempfile
    from pathlib import Path

    from tests.fuzz.bases import make_base

    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), base)
        return (Path(folder) / "shards" / "tpctl.json").read_text()


def _manifest(base: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_manifest_text(base))
    return value


@st.composite
def tokenizer_cases(draw: Draw) -> Case:
    """``tokenizer.json`` and the three files that say more of tokens."""
    path = draw(
        st.sampled_from(
            [
                "tokenizer.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
            ]
        )
    )
    known: dict[str, tuple[Any, Mapping[str, Any]]] = {
        "tokenizer.json": (words_tokenizer(), token_fields.TOKENIZER),
        "tokenizer_config.json": (WORDS_CONFIG, token_fields.TOKENIZER_CONFIG),
        "special_tokens_map.json": (
            {"bos_token": "<s>", "additional_special_tokens": ["<x>"]},
            token_fields.SPECIAL_TOKENS,
        ),
        "added_tokens.json": ({"<tool>": 263}, token_fields.ADDED_TOKENS),
    }
    change = draw(json_files(f"model/{path}", *known[path]))
    changes: tuple[Change, ...] = (change,)
    if path == "special_tokens_map.json":
        changes += (Change("model/tokenizer_config.json", "remove"),)
    return Case("tokenizer", WORDS, changes, draw(st.sampled_from([(BATCH,), (CHAT,)])))


@st.composite
def template_cases(draw: Draw) -> Case:
    """A chat template, in its own file or in ``tokenizer_config.json``."""
    way = draw(st.integers(0, 19))
    if way == 0:
        changes: tuple[Change, ...] = (draw(forms("model/chat_template.jinja")),)
    elif way == 1:
        content, why = draw(broken_bytes(TEMPLATE.encode()))
        changes = (Change("model/chat_template.jinja", content=content, why=why),)
    else:
        text, why = draw(template_texts())
        raw = text.encode("utf-8", "surrogatepass")
        if way <= 14:
            changes = (Change("model/chat_template.jinja", content=raw, why=why),)
        else:
            value = draw(st.sampled_from([text, [{"name": "default", "template": text}], {"default": text}, [text]]))
            content = json.dumps({"eos_token": "</s>", "chat_template": value}).encode()
            changes = (
                Change("model/tokenizer_config.json", content=content, why=why),
                Change("model/chat_template.jinja", "remove"),
            )
    commands = draw(st.sampled_from([(CHAT,), (CHAT,), (BATCH,), ((*CHAT, "--system", "be\nbrief"),)]))
    return Case("template", "llama", changes, commands)


@st.composite
def line_cases(draw: Draw) -> Case:
    """The lines of a batch file. Who gives a pipe wants it to be waited for."""
    content, why = draw(line_files())
    base = draw(st.sampled_from(["llama", WORDS]))
    if draw(st.integers(0, 3)):
        change = (
            Change("lines.jsonl", content=content, why=why)
            if draw(st.integers(0, 19))
            else draw(forms("lines.jsonl", "fifo"))
        )
        return Case("jsonl", base, (change,), (BATCH,))
    return Case("jsonl", base, (), (("batch", "-", "--model", "model"),), stdin=content)


TARGETS: dict[str, st.SearchStrategy[Case]] = {
    "config": config_cases(),
    "index": index_cases(),
    "header": header_cases(),
    "manifest": manifest_cases(),
    "tokenizer": tokenizer_cases(),
    "template": template_cases(),
    "jsonl": line_cases(),
    "options": option_cases(),
}
