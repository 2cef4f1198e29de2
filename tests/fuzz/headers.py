"""Safetensors files whose length field, header or data are not as the format wants them."""

from __future__ import annotations

import json
import struct
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import fields
from tests.fuzz.bases import config_of
from tests.fuzz.case import Case, Change
from tests.fuzz.commands import CHAT, PLAN, shard_and_prove
from tests.fuzz.mutations import Draw, broken_bytes, forms, json_bytes, json_values
from tests.unit.synthetic import source_shapes
from tpctl.checkpoint.safetensors import TensorSpec, build_header


@st.composite
def header_cases(draw: Draw) -> Case:
    """A safetensors file: its length field, the header's JSON, what that says of the data, and the data's end."""
    header = _header()
    body = json.loads(header.text)
    path = "model/model.safetensors"
    data = header.file_size - header.size
    way = draw(st.integers(0, 9))
    if way == 0:
        change = draw(forms(path))
    elif way == 1:
        ends = st.sampled_from([0, 1, 7, 8, 9, header.size, header.size + 1])
        change = Change(path, "cut", size=draw(ends | st.integers(0, header.file_size)))
    elif way == 2:
        change = Change(path, "flip", size=draw(st.integers(0, 8 * header.size - 1)))
    elif way == 3:
        length = draw(st.sampled_from(fields.LENGTHS) | st.integers(0, 2**64 - 1))
        change = Change(path, content=struct.pack("<Q", length) + header.raw[8:] + bytes(data), why=f"length {length}")
    else:
        text, why = draw(_headers(body) if way <= 5 else _changed_headers(body) if way == 6 else _other_headers(body))
        data += draw(st.sampled_from([0, 0, 0, 0, 0, -1, 1, 8]))
        content = struct.pack("<Q", len(text)) + text + (bytes(range(256)) * (data // 256 + 1))[:data]
        change = Change(path, content=content, why=why)
    commands = [shard_and_prove(2), shard_and_prove(3, "--dtype", "float32")[:1], (PLAN,), (CHAT,)]
    return Case("header", "llama", (change,), draw(st.sampled_from(commands)))


@st.composite
def _headers(draw: Draw, body: dict[str, Any]) -> tuple[bytes, str]:
    """A header in which one or two tensors say something else of themselves."""
    said = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(body)))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "data_offsets"]))
        new = draw(st.sampled_from(fields.TENSORS[key]))
        if key == "data_offsets" and draw(st.booleans()):
            first, last = _offsets()[name]
            new = draw(
                st.sampled_from([[first, first], [last, first], [first, last - 1], [first + 2, last], [0, last]])
            )
        body[name] = {**body[name], key: new}
        said.append(f"{name} {key} = {str(new)[:80]}")
    return draw(json_bytes(body)), "; ".join(said)


@st.composite
def _changed_headers(draw: Draw, body: dict[str, Any]) -> tuple[bytes, str]:
    """A header with any of the changes that other JSON gets too."""
    value, why = draw(json_values(body, {"__metadata__": fields.METADATA}))
    text = draw(json_bytes(value))
    if draw(st.integers(0, 3)):
        return text, why
    text, how = draw(broken_bytes(text))
    return text, f"{why}; {how}"


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
    return build_header([TensorSpec(name, "BF16", shape) for name, shape in source_shapes(config_of("llama")).items()])


@cache
def _offsets() -> dict[str, list[int]]:
    return {name: entry["data_offsets"] for name, entry in json.loads(_header().text).items()}
