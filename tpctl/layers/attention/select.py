"""Which attention backends there are, and which one to use."""

from __future__ import annotations

from tpctl.errors import EngineError
from tpctl.layers.attention.base import AttentionBackend, HeadShape

BACKENDS = ("sdpa",)


def make_backend(name: str, device_type: str, heads: HeadShape, block_size: int | None) -> AttentionBackend:
    """The backend called ``name``, or the best one for the device for ``"auto"``.

    Args:
        block_size: tokens in a KV block; ``None`` takes the backend's own choice.

    Raises:
        EngineError: no such backend, or not for this device.
    """
    if name not in ("auto", *BACKENDS):
        raise EngineError(f"unknown attention backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    from tpctl.layers.attention.sdpa import SdpaBackend

    return SdpaBackend(heads, block_size or SdpaBackend.default_block_size)
