"""Shard folders with damage in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import MANIFEST
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shard folder; tests put back what they change."""
    folder = tmp_path_factory.mktemp("damage")
    source = make_checkpoint(folder / "model", make_config(num_hidden_layers=1), files=2)
    shard_checkpoint(source, folder / "out", 2, max_part_size=6000)
    return folder / "out"


def damaged(out: Path, raw: bytes, *, verify: bool = True) -> str:
    """The message about ``out`` with the manifest ``raw``."""
    path = out / MANIFEST
    right = path.read_bytes()
    path.write_bytes(raw)
    try:
        with pytest.raises(ShardFolderError) as caught:
            inspect_shards(out, verify=verify)
    finally:
        path.write_bytes(right)
    message = str(caught.value)
    assert "\n" not in message and MANIFEST in message
    return message


def replaced(raw: bytes, old: str, new: str, after: str = "") -> bytes:
    place = raw.index(old.encode(), raw.index(after.encode()))
    return raw[:place] + new.encode() + raw[place + len(old) :]


def named(raw: bytes, place: int) -> list[str]:
    """What a message about byte ``place`` has to contain."""
    first = raw.rfind(b"\n", 0, place) + 1
    line = raw[first : raw.index(b"\n", place) + 1].decode()
    tensor = re.match(r' {4}"([^"]+)":\{"part"', line)
    if tensor is not None and place > first + 3:
        rank = re.findall(rb'\n  "(\d)":\{', raw[:place])[-1].decode()
        return [tensor[1], f"rank {rank}"]
    key = re.match(r' *"(\w+)":[^{[]', line)
    return [key[1]] if key is not None and place > first + line.index('"') and line.startswith(' "') else []
