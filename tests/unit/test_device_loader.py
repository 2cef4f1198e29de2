"""Shard files in pieces: every byte lands where its tensor is. On a GPU where there is one, else with CUDA's part
(streams, events, pinned memory) played by the host."""

from __future__ import annotations

import json
import os
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpctl.errors import ShardFolderError
from tpctl.models import device_loader
from tpctl.models.device_loader import load_files

KIB = 1 << 10


class HostEvent:
    """Done at the second time of asking, so that waiting is gone through too."""

    def __init__(self) -> None:
        self.recorded = self.waited = 0

    def query(self) -> bool:
        return not self.recorded

    def synchronize(self) -> None:
        self.waited += 1

    def record(self, stream: object) -> None:
        self.recorded += 1


class HostStream:
    def __init__(self, device: torch.device) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(device_loader, "PIECE", 64 * KIB)
    if torch.cuda.is_available():
        return torch.device("cuda")
    empty = torch.empty

    def unpinned(*arguments: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        return empty(*arguments, **settings)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda value: nullcontext())
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


@pytest.mark.parametrize("lost", [1, 70 * KIB])
def test_a_file_that_ends_early(device: torch.device, tmp_path: Path, lost: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(0), path)
    os.truncate(path, path.stat().st_size - lost)
    with pytest.raises(ShardFolderError, match="ends before its header says; shard it again"):
        load_files([path], device)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "w in x.safetensors is F8_E4M3"),
        ({"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 10]}, r"w in x.safetensors has 10 bytes for .*2, 3"),
    ],
)
def test_what_cannot_be_run(device: torch.device, tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ShardFolderError, match=said):
        load_files([path], device)
