"""The first kernel of a decode step: from a few numbers per row to everything the layers and the sampler need.

The host sends three int32 per row: the sequence's slot, the position of its new token, and the token itself, or, when
the step before has not come back yet, -1 - row of that step's sampled tokens, which are still on the device. (A token
below 0 there marks a row that has failed: it is read as token 0, and what comes of it is wasted.) What does not change
from step to step (block tables, seeds, temperatures, rotary offsets) lies in per-slot tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import next_power_of_2
from tpctl.kernels.common.noise import splitmix64
from tpctl.kernels.sampling.floors import Filters

_NUMBERS = Struct("=Qfiffi")  # what a slot has beside its block tables,
_CELLS = _NUMBERS.size // 4  # and in how many cells
_CELL = Struct(f"={_CELLS}i")


@dataclass(frozen=True)
class SlotTables:
    """Per-slot state on the device, for ``slots`` sequences.

    block_tables: int32 [pools, slots, M]. seed_hash: int64 [slots], SplitMix64 of the seed. filters: [slots].
    rope_offset: int32 [slots].
    """

    block_tables: torch.Tensor
    seed_hash: torch.Tensor
    filters: Filters
    rope_offset: torch.Tensor

    @staticmethod
    def allocate(slots: int, max_blocks: int, device: torch.device, pools: int = 1) -> SlotTables:
        size = SlotTables.first_block(slots) + pools * slots * max_blocks
        return SlotTables.of(torch.zeros(size, dtype=torch.int32, device=device), slots, pools)

    @staticmethod
    def of(cells: torch.Tensor, slots: int, pools: int = 1) -> SlotTables:
        """All of them in one tensor, int32 and all zero, so that one copy changes whatever is new: ``cells_of`` each
        slot, and behind them, from ``first_block`` on, the block tables."""
        seed_hash, *others = torch.split(cells[: _CELLS * slots], [2 * slots, *[slots] * (_CELLS - 2)])
        temperature, top_k, top_p, min_p, rope_offset = others
        floats = torch.float32
        filters = Filters(temperature.view(floats), top_k, top_p.view(floats), min_p.view(floats))
        filters.top_p.fill_(1)  # as others that keep all
        tables = cells[SlotTables.first_block(slots) :].view(pools, slots, -1)
        return SlotTables(tables, seed_hash.view(torch.int64), filters, rope_offset)

    @staticmethod
    def first_block(slots: int) -> int:
        """The cell of the first slot's first block, in a line of its own."""
        return -(-_CELLS * slots // 64) * 64

    @staticmethod
    def cells_of(slot: int, slots: int) -> list[int]:
        """Where what ``packed`` makes goes."""
        return [2 * slot, 2 * slot + 1, *(place * slots + slot for place in range(2, _CELLS))]

    @staticmethod
    def packed(seed_hash: int, filters: tuple[float, int, float, float], rope_offset: int) -> list[int]:
        """A slot's numbers as int32. ``seed_hash``: unsigned. ``filters``: as ``Filters``."""
        return list(_CELL.unpack(_NUMBERS.pack(seed_hash, *filters, rope_offset)))


@dataclass(frozen=True)
class DecodeInputs:
    """What one decode step of ``rows`` rows reads; fixed buffers, so that a captured graph can hold them.

    packed: int32 [3, rows] (slot or -1 for padding, position, token or -1 - reference), written by the host; below them
    may be what layers read.
    slot_mapping: int64 [pools, rows]. block_tables: int32 [pools, rows, M].
    """

    packed: torch.Tensor
    input_ids: torch.Tensor
    rope_positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    filters: Filters
    keys: torch.Tensor

    @staticmethod
    def allocate(rows: int, tables: SlotTables) -> DecodeInputs:
        pools, _, max_blocks = tables.block_tables.shape
        device = tables.block_tables.device

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return DecodeInputs(
            packed=empty(3, rows, dtype=torch.int32),
            input_ids=empty(rows),
            rope_positions=empty(rows),
            slot_mapping=empty(pools, rows),
            seq_lens=empty(rows, dtype=torch.int32),
            block_tables=empty(pools, rows, max_blocks, dtype=torch.int32),
            filters=Filters.allocate(rows, device),
            keys=empty(rows, 2),
        )

    def first(self, rows: int, packed: torch.Tensor) -> DecodeInputs:
        """The same memory for fewer rows; ``packed``, [3, rows] or more, has its own."""
        of_pools = {name: getattr(self, name)[:, :rows] for name in ("slot_mapping", "block_tables")}
        own = {name: getattr(self, name)[:rows] for name in ("input_ids", "rope_positions", "seq_lens", "keys")}
        return DecodeInputs(packed=packed, filters=self.filters.rows(slice(rows)), **of_pools, **own)


@triton.jit
def _splitmix64(state):
    z = state + tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def _prepare_kernel(
    packed_ptr,
    sampled_ptr,
    tables_ptr,
    seed_hash_ptr,
    rope_offset_ptr,
    slot_temperature_ptr,
    slot_top_k_ptr,
    slot_top_p_ptr,
    slot_min_p_ptr,
    input_ids_ptr,
    rope_positions_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    out_tables_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    keys_ptr,
    rows,
    max_blocks,
    tables_stride,
    out_tables_stride,
    slot_mapping_stride,
    POOLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(packed_ptr + row)
    position = tl.load(packed_ptr + rows + row)
    token = tl.load(packed_ptr + 2 * rows + row)
    live = slot >= 0
    slot = tl.maximum(slot, 0).to(tl.int64)
    used = tl.where(live, position // BLOCK_SIZE + 1, 0)
    for pool in tl.static_range(POOLS):
        table = tables_ptr + pool * tables_stride + slot * max_blocks
        out_table = out_tables_ptr + pool * out_tables_stride + row.to(tl.int64) * max_blocks
        for start in range(0, used, WIDTH):
            at = start + tl.arange(0, WIDTH)
            tl.store(out_table + at, tl.load(table + at, mask=at < used, other=0), mask=at < used)
        block = tl.load(table + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        mapped = tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        tl.store(slot_mapping_ptr + pool * slot_mapping_stride + row, mapped)
    referred = tl.load(sampled_ptr + tl.maximum(-1 - token, 0), mask=token < 0, other=0)
    tl.store(input_ids_ptr + row, tl.where(token < 0, tl.maximum(referred, 0), token.to(tl.int64)))
    offset = tl.load(rope_offset_ptr + slot)
    tl.store(rope_positions_ptr + row, tl.where(live, position + offset, 0).to(tl.int64))
    tl.store(seq_lens_ptr + row, tl.where(live, position + 1, 0))
    tl.store(temperature_ptr + row, tl.where(live, tl.load(slot_temperature_ptr + slot), 0.0))  # padding is greedy
    tl.store(top_k_ptr + row, tl.load(slot_top_k_ptr + slot))
    tl.store(top_p_ptr + row, tl.load(slot_top_p_ptr + slot))
    tl.store(min_p_ptr + row, tl.load(slot_min_p_ptr + slot))
    # The sampled token takes the next position (see engine.noise.noise_keys).
    seed = tl.load(seed_hash_ptr + slot).to(tl.uint64, bitcast=True)
    mixed = _splitmix64(seed + (position + 1).to(tl.uint64))
    tl.store(keys_ptr + 2 * row, (mixed & 0xFFFFFFFF).to(tl.int64))
    tl.store(keys_ptr + 2 * row + 1, (mixed >> 32).to(tl.int64))


def prepare_decode(inputs: DecodeInputs, sampled: torch.Tensor, slots: SlotTables, block_size: int) -> None:
    """Fill ``inputs`` from its packed rows; ``sampled`` int64 holds the token ids of the step before."""
    pools, rows, max_blocks = inputs.block_tables.shape
    _prepare_kernel[(rows,)](
        inputs.packed,
        sampled,
        slots.block_tables,
        slots.seed_hash,
        slots.rope_offset,
        *slots.filters,
        inputs.input_ids,
        inputs.rope_positions,
        inputs.slot_mapping,
        inputs.seq_lens,
        inputs.block_tables,
        *inputs.filters,
        inputs.keys,
        rows,
        max_blocks,
        slots.block_tables.stride(0),
        inputs.block_tables.stride(0),
        inputs.slot_mapping.stride(0),
        POOLS=pools,
        BLOCK_SIZE=block_size,
        WIDTH=min(1024, next_power_of_2(max_blocks)),
        num_warps=1,
    )


def prepare_decode_reference(inputs: DecodeInputs, sampled: torch.Tensor, slots: SlotTables, block_size: int) -> None:
    """The same, row by row on the host."""
    for row, (slot, position, token) in enumerate(inputs.packed.t().tolist()):
        live = slot >= 0
        slot = max(slot, 0)
        used = position // block_size + 1 if live else 0
        inputs.block_tables[:, row, :used] = slots.block_tables[:, slot, :used]
        blocks = slots.block_tables[:, slot, position // block_size].long()
        inputs.input_ids[row] = token if token >= 0 else sampled[-1 - token].clamp(min=0)
        inputs.rope_positions[row] = position + int(slots.rope_offset[slot]) if live else 0
        inputs.slot_mapping[:, row] = blocks * block_size + position % block_size if live else -1
        inputs.seq_lens[row] = position + 1 if live else 0
        for mine, theirs in zip(inputs.filters, slots.filters, strict=True):
            mine[row] = theirs[slot]
        inputs.filters.temperature[row] *= live
        mixed = splitmix64(int(slots.seed_hash[slot]) + position + 1)
        inputs.keys[row] = torch.tensor([mixed & 0xFFFFFFFF, mixed >> 32])
