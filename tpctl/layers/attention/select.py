"""The attention backend that ``tpctl.attention_choice`` decides for, built."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from tpctl import attention_choice
from tpctl.accounting import KeptLayer, layer_pools
from tpctl.attention_choice import KINDS, Heads, Machine, check_block_size, choose
from tpctl.layers.attention.base import AttentionBackend, AttentionSpec


def choose_backend(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that ``name`` means on this machine. Raises ``UsageError`` if there is none, or it does not run
    here."""
    return attention_choice.choose_backend(name, device_type, _name_of(dtype), _machine())


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
    """Build the backend that is chosen (``attention_choice.choose``).

    Args:
        layers: what each layer computes.
        block_size: tokens in a KV block; ``None`` takes the backend's own choice.
        kv_cache_dtype: as in ``EngineConfig``.
        whole_heads: all dimensions of a head are rotated, in every layer.
        ranks: what each rank keeps of every layer; without it all blocks are kept, whatever windows layers have.
        longest: tokens of the longest sequence.

    Raises:
        UsageError: it does not run here, or not with this block size.
        EngineError: flash-attn is not installed, or not in a version that does what is asked.
    """
    kind: type[AttentionBackend[Any]]
    latent = any(spec.latent is not None for spec in layers)
    heads = [Heads(spec.head_dim, whole_heads, spec.latent is not None, spec.sinks) for spec in layers]
    chosen, form = choose(name, kv_cache_dtype, device_type, _name_of(dtype), heads, machine=_machine())
    if chosen == "flash-attn":
        from tpctl.layers.attention.flash import FlashAttentionBackend as kind
    elif chosen == "triton":
        from tpctl.layers.attention.triton import TritonBackend as kind
    else:
        from tpctl.layers.attention.sdpa import SdpaBackend as kind
    size = block_size or KINDS[chosen].block_size
    check_block_size(size, chosen)
    pools = None
    if KINDS[chosen].slides and ranks is not None and longest is not None:
        pools = layer_pools(ranks, longest, form)
    if latent and chosen == "sdpa":
        from tpctl.layers.attention.sdpa_latent import SdpaLatentBackend

        return SdpaLatentBackend(layers, size, pools)
    if latent:
        from tpctl.layers.attention.triton_latent import TritonLatentBackend

        return TritonLatentBackend(layers, size, pools, dtype)
    if form == "model":
        return kind(layers, size, pools=pools)
    if chosen == "sdpa":
        from tpctl.layers.attention.sdpa_fp8 import SdpaFp8Backend

        return SdpaFp8Backend(layers, size, pools)
    from tpctl.layers.attention.triton import TritonBackend

    return TritonBackend(layers, size, form, pools)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine() -> Machine:
    """This one; without GPUs, one whose GPUs can do all."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return Machine(find_spec("triton") is not None, not old)
