"""Shard files in pieces: every byte lands where its tensor is. On a GPU where there is one, else with CUDA's part
(streams, events, pinned memory) played by the host."""

from __future__ import annotations

import json
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tpctl.checkpoint.safetensors import read_header
from tpctl.errors import ShardFolderError
from tpctl.models import device_loader, loader
from tpctl.models.device_loader import load_files

KIB = 1 << 10
COPY = Tensor.copy_


class HostStream:
    """Copies that are made as late as may be: when somebody waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def run(self, count: int) -> None:
        for target, source in self.pending[self.done : count]:
            COPY(target, source)
        self.done = max(self.done, count)

    def synchronize(self) -> None:
        self.run(len(self.pending))


class HostEvent:
    def __init__(self) -> None:
        self.stream: HostStream | None = None
        self.count = 0

    def record(self, stream: HostStream) -> None:
        self.stream, self.count = stream, len(stream.pending)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.count

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.run(self.count)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(device_loader, "PIECE", 64 * KIB)
    if torch.cuda.is_available():
        return torch.device("cuda")
    empty = torch.empty

    def unpinned(*arguments: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        return empty(*arguments, **settings)

    current = threading.local()

    @contextmanager
    def on(stream: HostStream) -> Iterator[None]:
        current.stream = stream
        yield
        del current.stream

    def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert non_blocking
        current.stream.pending.append((target, source))
        return target

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return torch.device("cpu")


def tensors(seed: int) -> dict[str, Tensor]:
    """Some that are many pieces long, some that end within one, of every dtype that is run, and next to nothing."""
    torch.manual_seed(seed)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "long": ((513, 1025), torch.bfloat16),
        "exact": ((2, 16 * KIB), torch.float32),
        "odd": ((3, 5, 7), torch.float16),
        "one": ((1,), torch.bfloat16),
        "none": ((0, 4), torch.float32),
        "scalar": ((), torch.float32),
    }
    return {f"{name}.{seed}": torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}


def test_every_byte_lands_where_its_tensor_is(device: torch.device, tmp_path: Path) -> None:
    files, expected = [], {}
    for number in range(3):
        files.append(tmp_path / f"{number}.safetensors")
        save_file(tensors(number), files[-1], metadata={"format": "pt"})
        expected |= tensors(number)
    found = load_files(files, device)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].device.type == device.type
        assert torch.equal(found[name].cpu(), tensor), name
    some = load_files(files, device, {"long.0", "odd.2", "of another file"})
    assert some.keys() == expected.keys() - {"long.0", "odd.2"}
    assert torch.equal(some["odd.1"].cpu(), expected["odd.1"])


def test_what_was_stored_is_let_go_as_it_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(*(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for _ in range(6)))
    model.made_of, model.held = SimpleNamespace(tied=False), []
    stored = {f"{layer}.weight": torch.randn(8, 8) for layer in range(6)}
    wanted = {name: tensor.bfloat16() for name, tensor in stored.items()}
    alive = [weakref.ref(tensor) for tensor in stored.values()]
    counts, emptied = [], []

    def replace(*arguments: Any) -> None:
        counts.append(sum(tensor() is not None for tensor in alive))
        original(*arguments)

    original = loader._replace
    monkeypatch.setattr(loader, "_replace", replace)
    monkeypatch.setattr(
        device_loader, "load_files", lambda files, device, skipped: dict(stored.popitem() for _ in range(6))
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    assert loader.load_shard(model, [], torch.device("cuda")) == 6 * 8 * 8 * 2
    assert counts == [6, 5, 4, 3, 2, 1]
    assert emptied == [1]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name])


@pytest.mark.parametrize("lost", [1, 70 * KIB])
def test_a_file_that_ends_early(device: torch.device, tmp_path: Path, lost: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(0), path)
    os.truncate(path, path.stat().st_size - lost)
    with pytest.raises(ShardFolderError, match="is truncated: its tensors end at"):
        load_files([path], device)


@pytest.mark.parametrize("lost", [1, 70 * KIB])
def test_a_file_that_loses_its_end_once_its_header_was_read(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(0), path)
    header = read_header(path)
    monkeypatch.setattr(device_loader, "read_header", lambda path: header)
    os.truncate(path, path.stat().st_size - lost)
    with pytest.raises(ShardFolderError, match="ends before its header says; shard it again"):
        load_files([path], device)


@pytest.mark.parametrize(
    ("entry", "size", "said"),
    [
        ({"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}, 4, "w in x.safetensors is F8_E5M2"),
        ({"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 10]}, 10, r"w spans 10 bytes, but BF16 of .*2, 3"),
    ],
)
def test_what_cannot_be_run(device: torch.device, tmp_path: Path, entry: dict[str, Any], size: int, said: str) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(ShardFolderError, match=said):
        load_files([path], device)
