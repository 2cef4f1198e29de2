"""Which attention backend runs a model on a device, and how it keeps keys and values.

Decided here alone: for the engine, for the planner, and for the front, which refuses before anything is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tpctl.accounting import PACKED_HEAD_DIMS, KvForm
from tpctl.arch.latent import Attending, LatentAttention
from tpctl.errors import UsageError

BACKENDS = ("flash-attn", "triton", "sdpa")


class Kind(NamedTuple):
    """What the planner has to know of a backend, too.

    Attributes:
        block_size: tokens in a KV block, unless others are asked for.
        slides: it reads no block that windows have passed, so that these can be given away.
        paged: on a GPU it reads the cache in place; otherwise it gathers what it reads.
    """

    block_size: int
    slides: bool = True
    paged: bool = True


KINDS = {
    "flash-attn": Kind(256, slides=False),  # which blocks its packages read beside those of a window is theirs
    "triton": Kind(128),
    "sdpa": Kind(32, paged=False),
}


class Machine(NamedTuple):
    """What counts of a machine with GPUs: whether it has the triton package, and GPUs with arithmetic in bfloat16."""

    triton: bool = True
    bfloat16: bool = True


class Heads(NamedTuple):
    """What counts of a layer: the dimensions of its heads, whether all of them are rotated, or none; and whether its
    attention is latent, and has sinks."""

    dim: int
    whole: bool = True
    latent: bool = False
    sinks: bool = False

    @staticmethod
    def of(attention: Attending) -> Heads:
        if isinstance(attention, LatentAttention):
            return Heads(attention.sizes.kept, latent=True)
        return Heads(attention.head_dim, not attention.rotates_part, sinks=attention.sinks is not None)


class Choice(NamedTuple):
    """An attention backend, and how it keeps keys and values."""

    backend: str
    kv_form: KvForm


def choose(
    backend: str,
    kv_cache_dtype: str,
    device: str,
    dtype: str | None,
    layers: Sequence[Heads],
    *,
    block_size: int | None = None,
    machine: Machine = Machine(),
) -> Choice:
    """What ``backend`` and ``kv_cache_dtype`` (as of ``EngineSettings``) come to for these layers.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: that the model runs in, as torch calls it; ``None``: it is not known yet, and nothing is refused for it.
        block_size: that is asked for.

    Raises:
        UsageError: they do not suit the device, the dtype or the layers.
    """
    chosen = choose_backend(backend, device, dtype, machine)
    latent, sinks = any(one.latent for one in layers), any(one.sinks for one in layers)
    if chosen == "flash-attn" and (latent or sinks):
        what = "latent attention" if latent else "attention sinks"
        raise UsageError(f"flash-attn knows no {what}, which this model has; use --attention-backend triton")
    if block_size is not None:
        check_block_size(block_size, chosen)
    return Choice(chosen, _kv_form(kv_cache_dtype, chosen, dtype, layers, machine))


def choose_backend(name: str, device: str, dtype: str | None, machine: Machine = Machine()) -> str:
    """The backend that ``name`` means on this device; ``"auto"`` takes the fastest that is there. Arguments and errors
    as of ``choose``."""
    if name not in ("auto", *BACKENDS):
        raise UsageError(f"unknown attention backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    if device == "cpu":
        if name not in ("auto", "sdpa"):
            raise UsageError(f"attention backend {name!r} needs a GPU; on a CPU use auto or sdpa")
        return "sdpa"
    if name in ("triton", "flash-attn") and not machine.triton:
        raise UsageError(
            f"attention backend {name!r} needs the triton package, which torch's builds for CUDA bring along: "
            "pip install triton, or use --attention-backend sdpa"
        )
    if name == "auto":
        return "triton" if machine.triton else "sdpa"
    if name == "flash-attn" and dtype not in (None, "bfloat16", "float16"):
        raise UsageError(
            f"flash-attn computes in bfloat16 or float16, not {dtype}; "
            "use --dtype bfloat16 or --attention-backend triton"
        )
    return name


def check_block_size(size: int, backend: str) -> None:
    """Refuse KV blocks of ``size`` tokens where the backend's kernels cannot read them. Raises ``UsageError``."""
    if size < 1 or (backend != "sdpa" and (size & (size - 1) or size < 16)):
        raise UsageError(f"--block-size {size} does not suit {backend}; use a power of two from 16 up")


def _kv_form(asked: str, backend: str, dtype: str | None, layers: Sequence[Heads], machine: Machine) -> KvForm:
    if asked == "model" or not layers:
        return "model"
    obstacle: str | None
    if any(one.latent for one in layers):
        obstacle = "keys and values of heads, not latent attention, which keeps a vector that all heads share"
    elif asked == "fp8":
        obstacle = _not_fp8(backend, dtype, layers, machine)
    else:
        obstacle = _not_packed(backend, dtype, layers, machine)
    if obstacle is None:
        return "fp8" if asked == "fp8" else "packed"
    if asked != "auto":
        raise UsageError(f"--kv-cache-dtype {asked} needs {obstacle}; use auto or model")
    return "model"


_BFLOAT16 = "a GPU of compute capability 8.0 or more, whose bfloat16 arithmetic it takes"
_DIMS = ", ".join(map(str, PACKED_HEAD_DIMS))


def _not_fp8(backend: str, dtype: str | None, layers: Sequence[Heads], machine: Machine) -> str | None:
    """What is missing for an FP8 KV cache (``kernels.attention.fp8_kv``); ``None`` if nothing is."""
    if backend == "flash-attn":
        return "--attention-backend triton or sdpa, not flash-attn"
    if backend == "sdpa":
        return None
    if not machine.bfloat16:
        return _BFLOAT16
    if dtype not in (None, "bfloat16", "float16"):
        return f"bfloat16 or float16 on a GPU, not {dtype}"
    others = [one.dim for one in layers if one.dim not in PACKED_HEAD_DIMS]
    return f"heads of {_DIMS} dimensions on a GPU, not {others[0]}" if others else None


def _not_packed(backend: str, dtype: str | None, layers: Sequence[Heads], machine: Machine) -> str | None:
    """What is missing for a packed KV cache (``kernels.attention.packed_kv``); ``None`` if nothing is."""
    if backend != "triton":
        return f"--attention-backend triton, not {backend}"
    if not machine.bfloat16:
        return _BFLOAT16
    if dtype not in (None, "bfloat16"):
        return f"bfloat16, not {dtype}"
    others = [one.dim for one in layers if one.dim not in PACKED_HEAD_DIMS or not one.whole]
    return f"heads of {_DIMS} dimensions, all of them rotated, not {others[0]}" if others else None
