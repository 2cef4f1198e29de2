"""What the hosts of one engine have to agree on: each has a command line, and shards, of its own."""

from __future__ import annotations

import json
import socket
from dataclasses import fields, replace
from hashlib import blake2b
from typing import Any

from tpctl.distributed import TPGroup
from tpctl.errors import UsageError
from tpctl.manifest.manifest import Manifest
from tpctl.wire.settings import EngineConfig, EngineSettings

_OWN = ("device", "engines_on_host")
"""Settings that are a host's own; all others are the first host's, for all."""


def agree(group: TPGroup, config: EngineConfig) -> EngineConfig:
    """This rank's ``config`` with the first host's settings (collective): the scheduler has to decide alike everywhere.

    Raises:
        UsageError: the model, its cut or the device is another one, here or on another rank.
    """
    mine = _described(group, config)
    said = json.loads(group.broadcast_text(json.dumps({"settings": config.to_dict(), "is": mine})))
    first = said["is"]
    names = [name for name in mine if mine[name] != first[name]]
    alike = group.minimum(int(not names)) == 1
    if names:
        what = ", ".join(f"{name} {mine[name]} (there {first[name]})" for name in names)
        raise UsageError(f"{socket.gethostname()} runs another engine than the first host: {what}; use the same")
    if not alike:
        raise UsageError("another host runs another engine than this, the first, and says what differs")
    if group.size != config.tp_size:
        raise UsageError(f"{group.size} ranks have met, but --tp is {config.tp_size}; use the same on every host")
    shared = [field.name for field in fields(EngineSettings) if field.name not in _OWN]
    return replace(config, **{name: said["settings"][name] for name in shared})


def _described(group: TPGroup, config: EngineConfig) -> dict[str, Any]:
    manifest = Manifest.load(config.shard_dir)
    files = blake2b(repr(manifest.source.files).encode(), digest_size=6).hexdigest()
    return {
        "device": config.device,
        "--tp": config.tp_size,
        "--ep": manifest.expert_parallel,
        "model": files,
        "dtype as stored": manifest.dtype,
    }
