"""tpctl: shard checkpoints and run tensor-parallel inference, from the command line or from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpctl.version import __version__

if TYPE_CHECKING:
    from tpctl.client.llm import LLM
    from tpctl.wire.sampling import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: every command and every worker imports this package."""
    if name == "LLM":
        from tpctl.client.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tpctl.wire.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'tpctl' has no attribute {name!r}")
