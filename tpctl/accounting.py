"""What the engine's memory goes to, as formulas: for the engine itself, and for the planner, which has no torch.

Sizes are in bytes unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

KvForm = Literal["model", "packed", "fp8"]
"""How keys and values are kept: as the model computes them; bfloat16 in 12 bits; in 8, one scale a vector."""

RESERVE = 512 << 20
"""Left of a GPU for what is not counted: the graphs themselves (with 28 layers 0.7 MiB each for decodes, 4 to 7 with
prompts; docs/log/2026-11-26-loading-and-memory.md), kernels that are loaded later, fragmentation."""

_LAYERS, _MORE = 32, 16 << 20

PACKED_HEAD_DIMS = (64, 128, 256)
"""Of heads whose keys and values can be packed (``kernels.attention.packed_kv``), or that kernels read in FP8."""

_MOST_UNPACKED = 8
"""Of a packed or an FP8 KV cache, what a step's prompts read at most unpacked, in steps of the largest size."""

_SAMPLED = 64
"""Rows that are sampled are padded to a multiple of this many in captured steps."""

SAMPLER_A_TOKEN = 96
"""What one row takes at most while it is sampled, for each token of the vocabulary: where a top-p set is so flat that
whole rows are sorted."""

SAMPLER_AT_ONCE = 512 << 20
"""What all rows sampled together may take so, or one row if it takes more."""


def reserve(num_layers: int) -> int:
    """``RESERVE``, and more for models of more than 32 layers, whose graphs are larger."""
    return RESERVE + _MORE * max(0, num_layers - _LAYERS)


def kv_bytes_per_token(
    heads: Iterable[tuple[int, int]], itemsize: int, form: KvForm = "model", latents: Iterable[int] = ()
) -> int:
    """What the keys and values of one token take in all layers.

    Args:
        heads: KV heads and their dimensions, of each layer.
        itemsize: of a value that is kept as it is.
        form: ``"packed"``: a vector is kept in 12 bits a value and a byte for the exponent of its largest; ``"fp8"``:
            in 8 bits a value and 2 bytes for its scale.
        latents: values that a layer keeps otherwise, as they are: of each with latent attention one vector's.
    """
    vectors = sum(2 * count * _vector_bytes(dim, itemsize, form) for count, dim in heads)
    return vectors + sum(latents) * itemsize


def state_bytes(layers: Iterable[tuple[int, int]], itemsize: int) -> int:
    """What one sequence's state takes in all recurrent layers.

    Args:
        layers: of each, numbers in its matrices, which are float32, and in its convolution, of ``itemsize`` bytes.
    """
    return sum(4 * matrices + inputs * itemsize for matrices, inputs in layers)


def state_slots(budget: int, slot_bytes: int, max_num_seqs: int) -> int:
    """States that a cache of ``budget`` bytes has room for: one a running sequence and as many that are kept for
    prefixes, in half of it at most."""
    return min(2 * max_num_seqs, max(0, budget) // 2 // slot_bytes) if slot_bytes else 0


def cache_for(kv_bytes: int, slot_bytes: int, max_num_seqs: int) -> int:
    """The least cache that has room for ``kv_bytes`` of keys and values beside ``state_slots``, of which one is."""
    return max(min(2 * kv_bytes, kv_bytes + 2 * max_num_seqs * slot_bytes), 2 * slot_bytes)


def _vector_bytes(dim: int, itemsize: int, form: KvForm) -> int:
    """Of what one token leaves in one head."""
    if form == "packed":
        return dim * 3 // 2 + 1
    return dim + 2 if form == "fp8" else dim * itemsize


def unpacked_tokens(step: int, max_model_len: int) -> int:
    """Tokens of a packed or an FP8 cache that the prompts of a step of ``step`` tokens read unpacked at most."""
    return min(_MOST_UNPACKED * step, step + max_model_len)


def sampled_rows(max_num_seqs: int) -> int:
    """Rows that a captured step samples at most, those that pad them included."""
    return -(-max_num_seqs // _SAMPLED) * _SAMPLED


def gathered_logits(logits: int, tp_size: int) -> int:
    """What gathering all ranks' logits takes, for top-k and top-p; ``logits`` are a rank's own."""
    return 0 if tp_size == 1 else (1 + tp_size) * logits


def rows_at_once(vocab: int) -> int:
    """Rows that the general sampler takes together, of ``vocab`` tokens over all ranks."""
    return max(1, SAMPLER_AT_ONCE // (SAMPLER_A_TOKEN * vocab))


def sampler_bytes(rows: int, vocab: int) -> int:
    """What the general sampler takes at most besides the logits, for ``rows`` of ``vocab`` tokens over all ranks."""
    return min(rows, rows_at_once(vocab)) * SAMPLER_A_TOKEN * vocab
