"""Headers: what the reference library writes is read, what it refuses is refused, and ours are byte for byte
its own."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save, save_file

from tpctl.checkpoint.safetensors import (
    MAX_HEADER,
    TensorSpec,
    build_header,
    parse_header,
    read_header,
    tensor_nbytes,
)
from tpctl.errors import CheckpointError
from tpctl.partition.dtypes import DTYPE_BITS

NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


def write(path: Path, entries: Any, data: bytes = b"") -> Path:
    """A file with that JSON header and data."""
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


shapes = st.lists(st.integers(0, 4), max_size=3)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(tensors=st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY)), shapes), min_size=1, max_size=6))
def test_built_headers_are_the_reference_writers(tensors: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.zeros(shape, NUMPY[dtype]) for name, (dtype, shape) in tensors.items()}
    theirs = save(arrays)
    ours = build_header(TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items())
    assert theirs[: ours.size] == ours.raw
    assert len(theirs) == ours.file_size


def test_a_file_of_the_reference_writer_is_read(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt"}
    assert data[: header.size] == header.raw
    for name, array in arrays.items():
        info = header.tensors[name]
        assert info.shape == array.shape
        assert data[info.start : info.stop] == array.tobytes()


BAD: list[tuple[str, Any, bytes, str]] = [
    ("not JSON", b"nonsense", b"", "no valid JSON"),
    ("not UTF-8", b'{"\xff":1}', b"", "no valid JSON"),
    ("a list", [], b"", "not a JSON object"),
    ("leading space", b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x", "not a JSON object"),
    ("deep nesting", b'{"a":' + b"[" * 100_000, b"", "it is nested too deeply"),
    ("duplicate key", b'{"a":1,"a":2}', b"", '"a" occurs twice'),
    ("metadata of numbers", {"__metadata__": {"x": 1}}, b"", "not an object of strings"),
    ("entry is no object", {"a": 3}, b"", "exactly dtype, shape and data_offsets"),
    ("an extra field", {"a": {**entry(), "more": 1}}, b"1234", "exactly dtype, shape and data_offsets"),
    ("unknown dtype", {"a": entry(dtype="F33")}, b"1234", 'unknown dtype "F33"'),
    ("dtype is a list", {"a": {**entry(), "dtype": []}}, b"1234", "unknown dtype"),
    ("negative size", {"a": entry(shape=(-1,))}, b"1234", "has the shape"),
    ("fractional size", {"a": entry(shape=(1.0,))}, b"1234", "has the shape"),
    ("size is a bool", {"a": entry(shape=(True,))}, b"1234", "has the shape"),
    ("three offsets", {"a": entry(offsets=(0, 4, 4))}, b"1234", "has the offsets"),
    ("offsets reversed", {"a": entry(offsets=(4, 0))}, b"1234", "spans -4 bytes"),
    ("size disagrees", {"a": entry(shape=(2,))}, b"1234", r"spans 4 bytes, but F32 of shape \[2\] has 8"),
    ("half a byte", {"a": entry("F4", (3,), (0, 1))}, b"1", "do not fill whole bytes"),
    ("gap at the start", {"a": entry(offsets=(4, 8))}, b"12345678", "leaves a gap before it"),
    ("gap inside", {"a": entry(), "b": entry(offsets=(8, 12))}, b"1" * 12, "b leaves a gap"),
    ("overlap", {"a": entry(), "b": entry(shape=(2,), offsets=(0, 8))}, b"1" * 8, "b overlaps another"),
    ("trailing bytes", {"a": entry()}, b"12345", "is damaged: its tensors end at byte .*; fetch it again"),
    ("data cut short", {"a": entry()}, b"123", "is truncated: its tensors end"),
]


def _changed(before: Sequence[int] = (1,), **changes: Any) -> dict[str, Any]:
    """A sound entry of the shape ``before``, and behind it one of the same dtype and shape but for ``changes``."""
    return {"a": entry(shape=before), "b": {**entry(shape=before, offsets=(4, 8)), **changes}}


# Each would equal the entry before it, were only values compared.
BAD += [
    (f"{what}, behind a sound one", _changed(**changes), bytes(8), message)
    for what, changes, message in (
        ("shape of truth", {"shape": [True]}, "shape"),
        ("shape of a float", {"shape": [1.0]}, "shape"),
        ("shape of texts", {"shape": ["1"]}, "shape"),
        ("shape of a text", {"shape": "1"}, "shape"),
        ("shape of lists", {"shape": [[1]]}, "shape"),
        ("no list of a dtype", {"dtype": ["F32"]}, "dtype"),
        ("offset of a float", {"data_offsets": [4.0, 8]}, "offsets"),
        ("three offsets", {"data_offsets": [4, 8, 8]}, "offsets"),
        ("larger span", {"data_offsets": [4, 9]}, "spans"),
        ("further key", {"more": 1}, "exactly"),
        ("empty text for a shape", {"before": (), "shape": ""}, "shape"),
        ("empty object for a shape", {"before": (), "shape": {}}, "shape"),
    )
]


@pytest.mark.parametrize(("entries", "data", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_malformed_headers_are_refused_with_file_and_reason(
    tmp_path: Path, entries: Any, data: bytes, message: str
) -> None:
    path = write(tmp_path / "bad.safetensors", entries, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, at least 8"),
        (b"1234567", "has 7 bytes, at least 8 are needed; fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n",
            "Git LFS leaves in its place; run `git lfs pull",
        ),
        (struct.pack("<Q", MAX_HEADER + 1), "would be 100000001 bytes long"),
        (struct.pack("<Q", 2**63), "would be"),
        (struct.pack("<Q", 100) + b"{}", "header ends at byte 108, the file has 10"),
    ],
)
def test_lengths_out_of_bounds_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x")


def test_a_missing_file_and_a_folder_are_errors_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@given(flip=st.integers(0, 8 * 100))
def test_no_flipped_header_bit_raises_anything_but_a_checkpoint_error(flip: int) -> None:
    header = build_header([TensorSpec("weight", "F32", (2, 3)), TensorSpec("bias", "BF16", (3,))])
    body = bytearray(header.raw[8:])
    place = (flip // 8) % len(body)
    body[place] ^= 1 << (flip % 8)
    try:
        changed = parse_header(bytes(body), header.file_size, "x")
    except CheckpointError:
        return
    assert changed.file_size == header.file_size


def test_sizes_of_every_dtype() -> None:
    for dtype, bits in DTYPE_BITS.items():
        assert tensor_nbytes(dtype, (8, 3)) == 3 * bits
    with pytest.raises(CheckpointError, match="'F12' is unknown"):
        tensor_nbytes("F12", (1,))


HOSTILE = {
    "a shape whose product takes for ever": (
        {"a": entry("U8", [10**4000] * 60, [0, 1])},
        "none that a tensor can have",
    ),
    "more axes than any tensor": ({"a": entry("U8", [1] * 100_000, [0, 1])}, "is none that a tensor can have"),
    "a product beyond 2^63": ({"a": entry("U8", [2**62, 2**62], [0, 1])}, "is none that a tensor can have"),
    "beyond 2^64, where it wraps to the right size": (
        {"a": entry("U8", [2**32, 2**32 + 1], [0, 2**32])},
        "is none that a tensor can have",
    ),
    "offsets beyond any file": ({"a": entry("U8", [1], [10**4000, 10**4000 + 1])}, "spans more than any file's bytes"),
    "a number of too many digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}", "no valid JSON"),
    "a huge name": ({"n" * 100_000: entry("U8", [1], [0, 1])}, "has a name of 100,000 characters"),
    "a name repeated among many": (
        b"{" + b"".join(b'"%d":1,' % n for n in range(200_000)) + b'"7":1}',
        'the key "7" occurs twice',
    ),
    "half a character": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "half a character"),
    "half a character in metadata": (b'{"__metadata__":{"a":"\\udfff"}}', "half a character"),
    "a long list as a dtype": ({"a": {**entry(), "dtype": ["x"] * 10**5}}, "has the unknown dtype"),
    "nesting as a shape": (
        b'{"a":{"dtype":"U8","shape":' + b"[" * 300 + b"]" * 300 + b',"data_offsets":[0,1]}}',
        "has the shape",
    ),
    "many values": (b"[" + b"{}," * 7_000_000 + b"{}]", "holds more than 6,000,000 values"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers_are_one_short_line_at_once(tmp_path: Path, what: str) -> None:
    entries, said = HOSTILE[what]
    path = write(tmp_path / "x.safetensors", entries, b"1")
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500 and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="it is a pipe or a device"):
        read_header(tmp_path / "pipe.safetensors")


VALID = {"a": entry("F32", (2,), (0, 8)), "b": entry("BF16", (0,), (8, 8)), "__metadata__": {"format": "pt"}}
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([2**63, 10**30, 1.5, float("nan"), "F99", "", [], {}, [8, 0], "\ud800"]),
)


@given(data=st.data())
def test_a_changed_header_is_refused_or_read_as_the_reference_reads_it(data: st.DataObject) -> None:
    header = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*sorted(header), "new"]))
        if name in header and isinstance(header[name], dict) and data.draw(st.booleans()):
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(odd)
        else:
            header[name] = data.draw(odd)
    body = json.dumps(header).encode()
    raw = struct.pack("<Q", len(body)) + body + b"12345678"
    try:
        found = parse_header(body, len(raw), "x")
    except CheckpointError as error:
        assert len(str(error)) < 600
        return
    theirs = deserialize(raw)
    assert {name: list(info.shape) for name, info in found.tensors.items()} == {n: t["shape"] for n, t in theirs}
