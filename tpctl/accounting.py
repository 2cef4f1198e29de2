"""What the engine's memory goes to, as formulas: for the engine itself, and for the planner, which has no torch.

Sizes are in bytes unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal, NamedTuple

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

_MOST_MADE = 1 << 26
"""Numbers of keys and values that a step's prompts make of latent vectors at once."""

_SAMPLED = 64
"""Rows that are sampled are padded to a multiple of this many in captured steps."""

_LEFT_OVER = 1 / 16
"""Of a slab, what blocks of any pool may leave unused where a larger slab would leave less."""

NET_CHUNK = 64
"""Tokens of a chunk of a gated delta net at most; it ends where its sequence does, or where a state is kept."""

MOST_NET_CHUNKS = 320
"""Of several sequences, chunks that are computed at once at most: what is between the kernels takes 3.2 MiB for each of
Qwen3.6-35B-A3B's, of which one sequence of 16,384 tokens has 256."""

SHORT = 512
"""Most tokens of a step with prompts that is captured where nothing is paced; a larger one takes as long as its
launches."""

CHUNKS = 8
"""Most prefill chunks of a captured step."""

_LEAST_ROWS = 512
"""Decodes that memory is kept for where fewer may run, for what they find in a prefix that they share."""

SAMPLER_A_TOKEN = 96
"""What one row takes at most while it is sampled, for each token of the vocabulary: where a top-p set is so flat that
whole rows are sorted."""

SAMPLER_AT_ONCE = 512 << 20
"""What all rows sampled together may take so, or one row if it takes more."""


def reserve(num_layers: int) -> int:
    """``RESERVE``, and more for models of more than 32 layers, whose graphs are larger."""
    return RESERVE + _MORE * max(0, num_layers - _LAYERS)


class KeptLayer(NamedTuple):
    """What a layer keeps on one rank: of each token so many vectors of ``dim`` numbers, keys and values together, for
    as long as a token sees them (``window``, as in ``LayerPool``). ``whole``: they are kept as they are, whatever the
    form of others."""

    window: int | None
    vectors: int
    dim: int
    whole: bool = False

    def token_bytes(self, itemsize: int, form: KvForm) -> int:
        return self.vectors * _vector_bytes(self.dim, itemsize, "model" if self.whole else form)


class LayerPools(NamedTuple):
    """The pools of a model's layers: their windows, as of ``KvLayout``, and the pool of each layer."""

    windows: tuple[int | None, ...]
    of_layer: tuple[int, ...]


def layer_pools(ranks: Sequence[Sequence[KeptLayer]], longest: int, form: KvForm = "model") -> LayerPools:
    """Which layers share a pool: those with the same window. One that is as long as any sequence is none.

    All are in one pool, whatever their windows, if layers with the same window differ in what they keep of a token, or,
    where keys and values are not kept as they are, any layers do: the pools' blocks could not share memory.

    Args:
        ranks: what each rank has of each layer.
        longest: tokens of the longest sequence.
    """
    layers = ranks[0]
    windows = [None if one.window is None or one.window >= longest else one.window for one in layers]
    found = tuple(sorted(set(windows), key=lambda window: window or 0))
    for rank in ranks:
        sizes = {(window if form == "model" else None, one[1:]) for window, one in zip(windows, rank, strict=True)}
        if len(found) > 1 and len(sizes) > (len(found) if form == "model" else 1):
            found, windows = (None,), [None] * len(layers)
    return LayerPools(found or (None,), tuple(found.index(window) for window in windows))


class LayerPool(NamedTuple):
    """Layers whose keys and values share block tables, as one rank has them: all that see equally far back.

    Attributes:
        window: tokens that they see, the token's own included; ``None``: all.
        layers: how many they are.
        layer_bytes: what one of them keeps of a KV block.
    """

    window: int | None
    layers: int
    layer_bytes: int

    @property
    def block_bytes(self) -> int:
        """What a block of the pool takes."""
        return self.layers * self.layer_bytes


@dataclass(frozen=True)
class KvLayout:
    """How KV memory is divided into blocks: the same on every rank.

    Memory is given to pools slab by slab. A slab holds blocks of one pool at a time, ``per_slab`` of them, and is given
    to another one when it is empty; so nobody has to know beforehand whether sequences will be short, when all layers
    need as many blocks, or long, when those with a window need few. With one pool a slab is a block.

    Attributes:
        windows: of each pool, as ``LayerPool.window``; ``None``, if any, comes first.
        per_slab: blocks of each pool that a slab holds.
    """

    block_size: int
    windows: tuple[int | None, ...] = (None,)
    per_slab: tuple[int, ...] = (1,)

    def blocks(self, pool: int, length: int) -> int:
        """Blocks of a pool that a sequence of ``length`` tokens holds at most while it is computed one by one."""
        whole, window = -(-length // self.block_size), self.windows[pool]
        return whole if window is None else min(whole, held_blocks(window, self.block_size))

    def slabs(self, length: int, sequences: int = 1, step: int = 0) -> int:
        """Slabs that so many sequences of ``length`` tokens hold at most, computed in steps of up to ``step`` tokens of
        prompts, all of which a step's queries may see."""
        total = 0
        for pool, (window, held) in enumerate(zip(self.windows, self.per_slab, strict=True)):
            blocks = sequences * self.blocks(pool, length)
            if window is not None:
                blocks += min(-(-step // self.block_size), sequences * -(-length // self.block_size) - blocks)
            total += -(-blocks // held)
        return total

    def longest(self, slabs: int) -> int | None:
        """Tokens of the longest sequence that so many slabs hold; ``None``: of any length, where all have windows."""
        low, high = 0, slabs * max(self.per_slab) + 1  # in blocks: held, not held
        if None not in self.windows and self.slabs(high * self.block_size) <= slabs:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.slabs(middle * self.block_size) <= slabs else (low, middle)
        return low * self.block_size


def pools_of(
    layers: Sequence[KeptLayer], pools: LayerPools, block_size: int, itemsize: int, form: KvForm
) -> list[LayerPool]:
    """What the pools' blocks take on a rank that keeps ``layers``."""
    found = []
    for number, window in enumerate(pools.windows):
        sizes = [
            block_size * one.token_bytes(itemsize, form)
            for one, pool in zip(layers, pools.of_layer, strict=True)
            if pool == number
        ]
        alike = len(set(sizes)) == 1
        found.append(LayerPool(window, len(sizes) if alike else 1, sizes[0] if alike else max(1, sum(sizes))))
    return found


class KvNeed(NamedTuple):
    """What sequences take of a rank's KV cache, in bytes.

    Attributes:
        token: every token, in the layers that see all of them.
        windows: every sequence, in the others, once it is as long as (tokens, bytes of each) say.
    """

    token: int
    windows: tuple[tuple[int, int], ...]

    def sequence(self, length: int) -> int:
        """A sequence of so many tokens."""
        return length * self.token + sum(min(length, tokens) * each for tokens, each in self.windows)

    def longest(self, cache: int, most: int) -> int:
        """Tokens of the longest sequence, of ``most``, that ``cache`` bytes hold."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.sequence(middle) <= cache else (low, middle)
        return low


def kv_need(pools: Sequence[LayerPool], layout: KvLayout) -> KvNeed:
    """What sequences take on the rank whose pools these are. A block counts with its part of what a slab leaves over;
    that blocks are not full does not count."""
    slab, token, windows = slab_bytes(pools, layout), 0, []
    for pool, held in zip(pools, layout.per_slab, strict=True):
        each = -(-slab // (held * layout.block_size))
        if pool.window is None:
            token += each
        else:
            windows.append((held_blocks(pool.window, layout.block_size) * layout.block_size, each))
    return KvNeed(token, tuple(windows))


def held_blocks(window: int, block_size: int) -> int:
    """Blocks that ``window`` tokens in a row touch at most."""
    return -(-(window - 1) // block_size) + 1


def layout_of(ranks: Sequence[Sequence[LayerPool]], block_size: int) -> KvLayout:
    """The layout for these pools, given as each rank has them: slabs as small as possible of which little is left over
    (a sixteenth at most, if any size up to eight of the largest blocks gives that)."""
    pools = ranks[0]
    windows = tuple(pool.window for pool in pools)
    best, least = (1,) * len(pools), (1.0, 0.0)
    for times in range(1, 9):
        largest = [_whole_layers(rank, times * max(pool.block_bytes for pool in rank)) for rank in ranks]
        sizes = list(zip(largest, ranks, strict=True))
        counts = tuple(min(size // rank[pool].block_bytes for size, rank in sizes) for pool in range(len(pools)))
        taken = [
            count * pool.block_bytes / size for size, rank in sizes for count, pool in zip(counts, rank, strict=True)
        ]
        left = 1 - min(taken), -sum(taken) / len(taken)
        if left < least:
            best, least = counts, left
        if least[0] <= _LEFT_OVER:
            break
    return KvLayout(block_size, windows, best)


def slab_bytes(pools: Sequence[LayerPool], layout: KvLayout) -> int:
    """What a slab takes on the rank whose pools these are: a whole number of what each layer keeps of a block."""
    return _whole_layers(pools, max(pool.block_bytes * held for pool, held in zip(pools, layout.per_slab, strict=True)))


def _whole_layers(pools: Sequence[LayerPool], size: int) -> int:
    """The next size that is a whole number of what each layer keeps of a block."""
    unit = lcm(*(pool.layer_bytes for pool in pools))
    return -(-size // unit) * unit


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


def net_chunk_bytes(key_heads: int, value_heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """What a chunk of a gated delta net takes between the kernels (``kernels.delta_net.chunks``), whose tiles have
    powers of two, from 16 on."""
    key, value = (max(16, 1 << (dim - 1).bit_length()) for dim in (key_dim, value_dim))
    mixed = 2 * key_heads * key + value_heads * value
    return NET_CHUNK * (mixed + value_heads * (value + 3 * key + NET_CHUNK)) * itemsize + 4 * value_heads


def net_chunks(longest: int) -> int:
    """Chunks that are computed at once at most, in steps whose prompts have ``longest`` tokens at most."""
    return max(MOST_NET_CHUNKS, -(-longest // NET_CHUNK))


def most_state_chunks(rows: int, prompts: int = CHUNKS) -> int:
    """Chunks of recurrent layers that a captured step has at most: each prompt may end in one that is not full, and so
    may two parts of it, behind which states are kept."""
    return rows // NET_CHUNK + 3 * prompts


def short_rows(max_num_batched_tokens: int) -> int:
    """Rows of the largest step with prefill chunks that a graph may hold, where nothing is paced."""
    return min(SHORT, max_num_batched_tokens)


def captured_rows(max_num_seqs: int, short: int, paced: int = 0) -> int:
    """Rows of the largest step that a graph may hold, with ``short_rows``, and where prompts are paced so many."""
    return max(max_num_seqs, short, paced)


def captured_bytes(activations: int, tokens: int, rows: int, logits: int, tp_size: int, chunk: int) -> int:
    """What all captured steps, of up to ``rows``, share for their activations: an upper bound.

    Args:
        activations: of the largest step, of ``tokens``; its logits are among them, and counted once more.
        logits: a rank's own, of the rows that are sampled.
        chunk: what one chunk of a recurrent layer takes, of the largest.
    """
    share = -(-activations * rows // tokens)
    return share + logits + gathered_logits(logits, tp_size) + most_state_chunks(rows) * chunk


def table_bytes(max_num_seqs: int, rows: int, width: int, pools: int) -> int:
    """Block tables: of twice the sequences that run and of a captured step's ``rows``, ``width`` blocks each."""
    return 4 * (2 * max_num_seqs + rows) * width * pools


def prefix_rows(decodes: int, heads: int) -> int:
    """Rows of what so many decodes of up to ``heads`` query heads find in a prefix that they share."""
    return max(_LEAST_ROWS, decodes) * heads


def prefix_bytes(decodes: int, heads: int, dim: int) -> int:
    """What those rows take, of heads of up to ``dim`` dimensions, in float32, each with two sums more."""
    return 4 * prefix_rows(decodes, heads) * (dim + 2)


def gathering_cache(left: int) -> int:
    """Of what is left on a GPU, what the KV cache may take where the reference gathers what it reads anew: the other
    half is for that and for activations."""
    return max(left, 0) // 2


def _vector_bytes(dim: int, itemsize: int, form: KvForm) -> int:
    """Of what one token leaves in one head."""
    if form == "packed":
        return dim * 3 // 2 + 1
    return dim + 2 if form == "fp8" else dim * itemsize


def unpacked_tokens(step: int, max_model_len: int) -> int:
    """Tokens of a packed, FP8 or latent cache that the prompts of a step of ``step`` tokens read unpacked at most."""
    return min(_MOST_UNPACKED * step, step + max_model_len)


class LatentRoom(NamedTuple):
    """What is kept for prompts that make keys and values of latent vectors: room for so many ``tokens``, in numbers of
    what they ``read`` of the cache and of what is ``made`` of it at once."""

    tokens: int
    read: int
    made: int


def latent_room(step: int, max_model_len: int, kept: int, made: int) -> LatentRoom:
    """The same for steps of ``step`` tokens, of which the cache keeps ``kept`` numbers each, and all heads together
    make ``made``."""
    tokens = unpacked_tokens(step, max_model_len)
    return LatentRoom(tokens, tokens * kept, min(_MOST_MADE, tokens * made))


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
