"""What is made wrong: one strategy of cases for each kind of input."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import fields
from tests.fuzz.bases import (
    GENERATION,
    INDEXED,
    SHARDS,
    TEMPLATE,
    VOCAB,
    WORDS,
    WORDS_CONFIG,
    config_of,
    words_tokenizer,
)
from tests.fuzz.case import Case, Change
from tests.fuzz.jsontext import seal
from tests.fuzz.lines import line_files
from tests.fuzz.mutations import Draw, broken_bytes, forms, json_bytes, json_files, json_values
from tests.fuzz.options import option_cases
from tests.fuzz.templates import template_texts
from tests.unit.synthetic import source_shapes
from tpctl.checkpoint.safetensors import NewTensor, build_header
from tpctl.models.specs import FAMILIES

Command = tuple[str, ...]
PROVE: tuple[Command, ...] = (
    ("inspect-shards", "out", "--verify", "--source", "model"),
    ("merge", "out", "-o", "merged"),
)
"""What shows that shards in ``out`` are right."""
CHAT: Command = ("chat", "model", "-m", "hi", "--seed", "1")
BATCH: Command = ("batch", "lines.jsonl", "--model", "model", "-o", "rows.jsonl")
PLAN: Command = ("plan", "model", "--json")


def shard_and_prove(tp: int, *more: str) -> tuple[Command, ...]:
    return (("shard", "model", "--tp", str(tp), "-o", "out", *more), *PROVE)


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
def header_cases(draw: Draw) -> Case:
    """A safetensors file: its length field, the header's JSON, what that says of the data, and the data's end."""
    header = _header()
    body = json.loads(header.text)
    path = "model/model.safetensors"
    data = header.file_size - header.size
    way = draw(st.integers(0, 9))
    if way == 0:
        changes: tuple[Change, ...] = (draw(forms(path)),)
    elif way == 1:
        changes = (
            Change(
                path,
                "cut",
                size=draw(
                    st.sampled_from([0, 1, 7, 8, 9, header.size, header.size + 1]) | st.integers(0, header.file_size)
                ),
            ),
        )
    elif way == 2:
        changes = (Change(path, "flip", size=draw(st.integers(0, 8 * header.size - 1))),)
    elif way == 3:
        length = draw(st.sampled_from(fields.LENGTHS) | st.integers(0, 2**64 - 1))
        changes = (
            Change(path, content=struct.pack("<Q", length) + header.raw[8:] + bytes(data), why=f"length {length}"),
        )
    else:
        if way <= 6:
            text, why = draw(_headers(body))
        elif way == 7:
            value, why = draw(json_values(body, {"__metadata__": fields.METADATA}))
            text = draw(json_bytes(value))
        else:
            text, why = draw(_other_headers(body))
        if not draw(st.integers(0, 9)):
            text, how = draw(broken_bytes(text))
            why += f"; {how}"
        grown = data + draw(st.sampled_from([0, 0, 0, -1, 1, 8]))
        changes = (
            Change(
                path,
                content=struct.pack("<Q", len(text)) + text + bytes(range(256)) * (grown // 256) + bytes(grown % 256),
                why=why,
            ),
        )
    commands = draw(
        st.sampled_from([shard_and_prove(2), shard_and_prove(3, "--dtype", "float32")[:1], (PLAN,), (CHAT,)])
    )
    return Case("header", "llama", changes, commands)


@st.composite
def _headers(draw: Draw, body: dict[str, Any]) -> tuple[bytes, str]:
    """A header in which one or two tensors say something else of themselves."""
    said = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(body)))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        body[name] = {**body[name], key: draw(st.sampled_from(fields.TENSORS[key]))}
        if not draw(st.integers(0, 2)):
            first, last = (
                body[name].get("data_offsets")
                if isinstance(body[name].get("data_offsets"), list) and len(body[name]["data_offsets"]) == 2
                else (0, 0)
            )
            body[name]["data_offsets"] = (
                draw(st.sampled_from([[first, first], [last, first], [first, last - 1], [first + 2, last], [0, last]]))
                if isinstance(first, int) and isinstance(last, int)
                else [0, 0]
            )
        said.append(f"{name} {key} = {body[name][key]}")
    return draw(json_bytes(body)), "; ".join(said)


@st.composite
def _other_headers(draw: Draw, body: dict[str, Any]) -> tuple[bytes, str]:
    """A header that says the same in other words."""
    names = draw(st.sampled_from([sorted(body), sorted(body, reverse=True), list(body)]))
    value = {name: body[name] for name in names}
    if draw(st.booleans()):
        value["__metadata__"] = draw(st.sampled_from(fields.METADATA))
    text: bytes = draw(json_bytes(value))
    return text + b" " * draw(st.integers(0, 9)), "in other words"


@cache
def _header() -> Any:
    return build_header([NewTensor(name, "BF16", shape) for name, shape in source_shapes(config_of("llama")).items()])


@st.composite
def manifest_cases(draw: Draw) -> Case:
    """``tpctl.json`` of a shard folder, mostly with the digest that fits it, and the files that it names."""
    path = "shards/tpctl.json"
    way = draw(st.integers(0, 9))
    if way == 0:
        change = draw(forms(f"shards/{draw(st.sampled_from(fields.SHARD_FILES))}"))
    elif way == 1:
        change = Change(
            f"shards/{draw(st.sampled_from(fields.SHARD_FILES))}", "flip", size=draw(st.integers(0, 1 << 20))
        )
    elif way == 2:
        change = draw(json_files(path, _manifest()))
    else:
        value, why = draw(json_values(_manifest(), fields.MANIFEST, most=2))
        text = seal(value) if isinstance(value, dict) else json.dumps(None)
        change = Change(path, content=text.encode("utf-8", "surrogatepass"), why=why)
    commands = draw(st.sampled_from(MANIFEST_COMMANDS))
    return Case("manifest", SHARDS, (change,), commands)


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
def _manifest_text() -> str:
    import tempfile
    from pathlib import Path

    from tests.fuzz.bases import make_base

    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), SHARDS)
        return (Path(folder) / "shards" / "tpctl.json").read_text()


def _manifest() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_manifest_text())
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
        "tokenizer.json": (words_tokenizer(), fields.TOKENIZER),
        "tokenizer_config.json": (WORDS_CONFIG, fields.TOKENIZER_CONFIG),
        "special_tokens_map.json": (
            {"bos_token": "<s>", "additional_special_tokens": ["<x>"]},
            fields.TOKENIZER_CONFIG,
        ),
        "added_tokens.json": ({"<tool>": 263}, fields.ADDED_TOKENS),
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
    """The lines of a batch file."""
    content, why = draw(line_files())
    base = draw(st.sampled_from(["llama", WORDS]))
    if draw(st.integers(0, 3)):
        change = (
            Change("lines.jsonl", content=content, why=why) if draw(st.integers(0, 19)) else draw(forms("lines.jsonl"))
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
assert VOCAB
