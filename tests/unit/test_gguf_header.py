"""GGUF headers that lie: one sentence each, in little time and memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.gguf_files import LAYERS, tiny_config, write_gguf
from tests.unit.synthetic import source_shapes
from tpctl.arch.families import FAMILIES
from tpctl.checkpoint.gguf.block_types import BLOCK_TYPES
from tpctl.checkpoint.gguf.config import ARCHITECTURES, Architecture
from tpctl.checkpoint.gguf.header import GgufError, read_gguf_header
from tpctl.checkpoint.gguf.model import GgufModel
from tpctl.checkpoint.gguf.tensors import match_tensors
from tpctl.errors import SourceError

HUGE = 2**63


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*keys: bytes, tensors: tuple[bytes, ...] = (), data: int = 64, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def array_of(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF", "the version would end at byte 8, the file has 4"),
        (b"GGML" + bytes(40), "it begins with b'GGML' instead of b'GGUF'"),
        (file(version=1), "it is GGUF version 1; tpctl reads versions 2 and 3"),
        (file(version=3 << 24), "it is a big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "the list of keys would have 9223372036854775808 entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "the list of tensors would have 9223372036854775808 entries"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(32), "a key would end at byte"),
        (file(key("a", 8, struct.pack("<Q", HUGE))), "a would end at byte"),
        (file(key("a", 9, array_of(8, HUGE))), "a would have 9223372036854775808 entries"),
        (file(key("a", 9, array_of(4, HUGE))), "a would have 9223372036854775808 entries"),
        (file(key("a", 9, array_of(9, 1, array_of(4, 0)))), "a is an array of the type 9"),
        (file(key("a", 99, b"")), "a has the type 99, which GGUF does not define"),
        (file(key("a", 8, struct.pack("<Q", 1) + b"\xff")), "a is not UTF-8 text"),
        (file(key("a", 4, bytes(4)), key("a", 4, bytes(4))), "the key a occurs twice"),
        (file(key("general.alignment", 4, struct.pack("<I", 3))), "general.alignment is no power of two"),
        (file(key("general.alignment", 8, string("x"))), "general.alignment is no power of two"),
        (file(tensors=(tensor(), tensor(offset=32))), "tensor t occurs twice"),
        (file(tensors=(tensor(), tensor("u"))), "tensor u overlaps another one"),
        (file(tensors=(tensor(offset=64),)), "tensor t would end at byte"),
        (file(tensors=(tensor(offset=8),)), "tensor t begins at byte 8 of the data, no multiple of 32"),
        (file(tensors=(tensor(shape=(HUGE, HUGE)),)), "tensor t would end at byte"),
        (file(tensors=(tensor(shape=(0,)),)), "tensor t of shape [0] does not consist of whole blocks of F32"),
        (file(tensors=(tensor(shape=(33, 2), kind=2),)), "tensor t of shape [2, 33] does not consist of whole blocks"),
        (file(tensors=(tensor(kind=31),)), "tensor t is of the type 31, which is not supported"),
        (file(tensors=(tensor(shape=(1,) * 5),)), "tensor t has 5 sizes, at most 4 are possible"),
        (file(tensors=(tensor(shape=()),)), "tensor t has 0 sizes"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(GgufError) as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert said in str(caught.value)


def test_what_a_header_says(tmp_path: Path) -> None:
    numbers = struct.pack("<3f", 1, 2, 3)
    keys = (
        key("a", 8, string("é")),
        key("b", 9, array_of(6, 3, numbers)),
        key("c", 7, b"\1"),
        key("d", 9, array_of(8, 2, string("x") + string(""))),
        key("general.name", 8, struct.pack("<Q", 2) + b"\xc3\x28"),
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(file(*keys, tensors=(tensor(shape=(4, 3)), tensor("q", (64,), 8, 64)), data=64 + 68))
    header = read_gguf_header(path)
    found = {**header.metadata, "b": list(header.metadata["b"])}  # type: ignore[arg-type]
    assert found == {"a": "é", "b": [1.0, 2.0, 3.0], "c": True, "d": ["x", ""], "general.name": "\ufffd("}
    first, second = header.tensors
    size = path.stat().st_size
    assert (first.shape, first.stop - first.start, first.block.name) == ((3, 4), 48, "F32")
    assert (second.start, second.stop, second.block.name) == (size - 68, size, "Q8_0")


def test_a_header_may_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("a", 9, array_of(10, 1 << 27))
    with path.open("wb") as sparse:
        sparse.write(head)
        sparse.truncate(1 << 31)
    tracemalloc.start()
    try:
        with pytest.raises(GgufError, match="a would have 134217728 entries"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_header_is_read_or_refused(tiny: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes differ: a model with all of its tensors, or one line."""
    content = bytearray(tiny)
    header = 7000
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(4, header))
        change = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8), st.sampled_from([bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f"])
            )
        )
        content[place : place + len(change)] = change
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    try:
        model = GgufModel.read(path)
    except (GgufError, SourceError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert len(model.weights) == 3 + 9 * LAYERS


def test_block_types_are_those_of_the_gguf_package() -> None:
    import gguf

    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (block.name, (block.values, block.nbytes))
        assert gguf.dequantize(np.zeros((2, block.nbytes), np.uint8), kind).shape == (2, block.values)


SWITCHES: dict[str, list[dict[str, bool]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True}],
    "qwen3": [{}, {"attention_bias": True}],
    "phi3": [{}],
    "qwen2": [{}],
    "gemma3": [{}],
}


@pytest.mark.parametrize(("name", "arch"), ARCHITECTURES.items())
def test_every_weight_of_the_plan_is_filled(name: str, arch: Architecture, tmp_path: Path) -> None:
    """The tensors asked of a GGUF are those that the plan for a safetensors checkpoint reads."""
    assert FAMILIES[arch.model_type].architecture == arch.class_name
    for switches in SWITCHES[name]:
        for tied in (False, True):
            config = tiny_config(arch.model_type, tie_word_embeddings=tied, **switches)
            path = tmp_path / "tiny.gguf"
            write_gguf(path, config, keys={f"{name}.attention.sliding_window": 16} if arch.sandwich else {})
            model = GgufModel.read(path)
            assert {weight.name: weight.shape for weight in model.weights} == source_shapes(config)
            with pytest.raises(GgufError, match="it holds no tensors"):
                match_tensors(arch, model.config, 1, {})
