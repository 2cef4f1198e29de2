"""tpctl in Ray Data: ``dataset.map_batches(tpctl.ray.Generator, …)``. docs/batch.md says how."""

from __future__ import annotations

import importlib.util

if (_found := importlib.util.find_spec("ray")) is None or _found.origin is None:
    raise ImportError("tpctl.ray needs Ray, which is not installed here; `pip install 'tpctl[ray]'`")

from tpctl.ray.generator import Generator

__all__ = ["Generator"]
