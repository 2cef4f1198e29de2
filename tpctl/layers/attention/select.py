"""Which attention backends there are, and which one to use."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from tpctl.accounting import PACKED_HEAD_DIMS, KeptLayer, KvForm, LayerPools, layer_pools
from tpctl.errors import EngineError
from tpctl.layers.attention.base import AttentionBackend, AttentionSpec

BACKENDS = ("flash-attn", "triton", "sdpa")


def choose_backend(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that ``name`` means on this device; ``"auto"`` takes the fastest that is there.

    Raises:
        EngineError: no such backend, or it does not run here.
    """
    if name not in ("auto", *BACKENDS):
        raise EngineError(f"unknown attention backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    if device_type == "cpu":
        if name not in ("auto", "sdpa"):
            raise EngineError(f"attention backend {name!r} needs a GPU; on a CPU use auto or sdpa")
        return "sdpa"
    if name in ("triton", "flash-attn") and find_spec("triton") is None:
        raise EngineError(
            f"attention backend {name!r} needs the triton package, which torch's builds for CUDA bring along: "
            "pip install triton, or use --attention-backend sdpa"
        )
    if name == "auto":
        return "triton" if find_spec("triton") is not None else "sdpa"
    if name == "flash-attn" and dtype not in (torch.bfloat16, torch.float16):
        raise EngineError(
            f"flash-attn computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}; "
            "use --dtype bfloat16 or --attention-backend triton"
        )
    return name


def make_backend(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    layers: Sequence[AttentionSpec],
    block_size: int | None,
    *,
    kv_cache_dtype: str = "model",
    whole_heads: bool = True,
    ranks: Sequence[Sequence[KeptLayer]] | None = None,
    longest: int | None = None,
) -> AttentionBackend[Any]:
    """Build the chosen backend (see ``choose_backend``).

    Args:
        layers: what each layer computes.
        block_size: tokens in a KV block; ``None`` takes the backend's own choice.
        kv_cache_dtype: as in ``EngineConfig``.
        whole_heads: all dimensions of a head are rotated, in every layer.
        ranks: what each rank keeps of every layer; without it all blocks are kept, whatever windows layers have.
        longest: tokens of the longest sequence.

    Raises:
        EngineError: it does not run here, or not with this block size.
    """
    kind: type[AttentionBackend[Any]]
    chosen = choose_backend(name, device_type, dtype)
    if any(spec.sinks for spec in layers) and chosen == "flash-attn":
        raise EngineError("flash-attn knows no attention sinks, which this model has; use --attention-backend triton")
    if chosen == "flash-attn":
        from tpctl.layers.attention.flash import FlashAttentionBackend as kind
    elif chosen == "triton":
        from tpctl.layers.attention.triton import TritonBackend as kind
    else:
        from tpctl.layers.attention.sdpa import SdpaBackend as kind
    size = block_size or kind.default_block_size
    if size < 1 or (chosen != "sdpa" and (size & (size - 1) or size < 16)):
        raise EngineError(f"--block-size {size} does not suit {chosen}; use a power of two from 16 up")
    form = _kv_form(kv_cache_dtype, chosen, dtype, layers, whole_heads)
    pools = None
    if kind.slides and ranks is not None and longest is not None:
        pools = layer_pools(ranks, longest, form)
    if any(spec.latent is not None for spec in layers):
        return _latent(chosen, dtype, layers, size, pools)
    if form == "model":
        return kind(layers, size, pools=pools)
    if chosen == "sdpa":
        from tpctl.layers.attention.sdpa_fp8 import SdpaFp8Backend

        return SdpaFp8Backend(layers, size, pools)
    from tpctl.layers.attention.triton import TritonBackend

    return TritonBackend(layers, size, form, pools)


def _latent(
    chosen: str, dtype: torch.dtype, layers: Sequence[AttentionSpec], size: int, pools: LayerPools | None
) -> AttentionBackend[Any]:
    """The backend of a model with latent attention. Raises ``EngineError``."""
    if chosen == "sdpa":
        from tpctl.layers.attention.sdpa_latent import SdpaLatentBackend

        return SdpaLatentBackend(layers, size, pools)
    if chosen == "flash-attn":
        raise EngineError("flash-attn knows no latent attention, which this model has; use --attention-backend triton")
    from tpctl.layers.attention.triton_latent import TritonLatentBackend

    return TritonLatentBackend(layers, size, pools, dtype)


def _kv_form(
    asked: str, backend: str, dtype: torch.dtype, layers: Sequence[AttentionSpec], whole_heads: bool
) -> KvForm:
    """How keys and values are kept where ``asked`` is as ``EngineConfig.kv_cache_dtype``. Raises ``EngineError``."""
    if asked == "model":
        return "model"
    obstacle: str | None
    if any(spec.latent is not None for spec in layers):
        obstacle = "keys and values of heads, not latent attention, which keeps a vector that all heads share"
    elif asked == "fp8":
        obstacle = _not_fp8(backend, dtype, layers)
    else:
        obstacle = _not_packed(backend, dtype, layers, whole_heads)
    if obstacle is None:
        return "fp8" if asked == "fp8" else "packed"
    if asked != "auto":
        raise EngineError(f"--kv-cache-dtype {asked} needs {obstacle}; use auto or model")
    return "model"


def _not_fp8(backend: str, dtype: torch.dtype, layers: Sequence[AttentionSpec]) -> str | None:
    """What is missing for an FP8 KV cache (``kernels.attention.fp8_kv``); ``None`` if nothing is."""
    if backend == "flash-attn":
        return "--attention-backend triton or sdpa, not flash-attn"
    if backend == "sdpa":
        return None
    if _without_bfloat16():
        return _BFLOAT16
    if dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 or float16 on a GPU, not {str(dtype).removeprefix('torch.')}"
    others = [spec.head_dim for spec in layers if spec.head_dim not in PACKED_HEAD_DIMS]
    return f"heads of {', '.join(map(str, PACKED_HEAD_DIMS))} dimensions on a GPU, not {others[0]}" if others else None


_BFLOAT16 = "a GPU of compute capability 8.0 or more, whose bfloat16 arithmetic it takes"


def _without_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)


def _not_packed(backend: str, dtype: torch.dtype, layers: Sequence[AttentionSpec], whole_heads: bool) -> str | None:
    """What is missing for a packed KV cache (``kernels.attention.packed_kv``); ``None`` if nothing is."""
    if backend != "triton":
        return f"--attention-backend triton, not {backend}"
    if _without_bfloat16():
        return _BFLOAT16
    if dtype != torch.bfloat16:
        return f"bfloat16, not {str(dtype).removeprefix('torch.')}"
    others = [spec.head_dim for spec in layers if spec.head_dim not in PACKED_HEAD_DIMS]
    if others or not whole_heads:
        known = ", ".join(map(str, PACKED_HEAD_DIMS))
        return f"heads of {known} dimensions, all of them rotated, not {[*others, layers[0].head_dim][0]}"
    return None
