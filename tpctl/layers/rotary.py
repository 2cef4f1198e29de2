"""Rotary position embedding: tables for every supported kind, and their application.

Su et al., "RoFormer" (2021). Pairs are (i, i + rotary_dim / 2), as in most Hugging Face checkpoints, or neighbours, as
in the paper: then what comes out is in the other order, (0, 2, 4, .., 1, 3, 5, ..), for queries and keys alike, so that
their products stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tpctl.arch.rope import PROPORTIONAL, RopeConfig, yarn_scale


class RotaryTable:
    """cos and sin of every position, float32 [rows, rotary_dim / 2].

    Long RoPE has two sets of frequencies, for sequences up to the length the model was first trained on and for
    longer ones; the second table lies behind the first. ``offset`` says where a sequence's table begins. One that
    grows beyond that length changes its table, and all of its keys must be rotated anew, as transformers does.
    """

    def __init__(self, config: RopeConfig, max_positions: int, device: torch.device | str) -> None:
        self.config = config
        self.max_positions = max_positions
        factors: list[str] = ["short_factor", "long_factor"] if config.kind == "longrope" else [""]
        angles = []
        positions = torch.arange(max_positions, dtype=torch.float32)
        for factor in factors:
            angles.append(torch.outer(positions, inverse_frequencies(config, factor)))
        scale = attention_scale(config)
        angle = torch.cat(angles)
        self.cos = (angle.cos() * scale).to(device)
        self.sin = (angle.sin() * scale).to(device)

    @property
    def interleaved(self) -> bool:
        """Whether neighbouring dimensions are pairs."""
        return self.config.interleaved

    def angles(self, rows_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin for ``apply_rotary``, [T, 1, rotary_dim] each: [cos, cos] and [-sin, sin] of the rows."""
        cos, sin = self.cos[rows_T].to(dtype), self.sin[rows_T].to(dtype)
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)

    def growth(self, positions_T: Tensor) -> Tensor | None:
        """float32 [T], what queries are multiplied by (Llama 4 and Ministral 3); ``None``: they stay as they are."""
        if self.config.growth is None:
            return None
        beta, length = self.config.growth
        return 1 + beta * torch.log(1 + torch.floor(positions_T / length))

    @cached_property
    def growths(self) -> Tensor | None:
        """float32 [max_positions]: ``growth`` of every position."""
        return self.growth(torch.arange(self.max_positions, device=self.cos.device))

    def offset(self, num_tokens: int) -> int:
        """The first row of the table that rotates all keys of a sequence of ``num_tokens`` tokens."""
        long = self.config.kind == "longrope" and num_tokens > self.config.original_max_position_embeddings
        return self.max_positions if long else 0


def rotary_tables(
    ropes: Sequence[RopeConfig | None], max_positions: int, device: torch.device | str
) -> tuple[RotaryTable | None, ...]:
    """Each layer's table; layers that rotate alike share one. ``None``: of layers that do not rotate."""
    tables: list[RotaryTable] = []
    found: list[RotaryTable | None] = []
    for rope in ropes:
        if rope is None:
            found.append(None)
            continue
        table = next((table for table in tables if table.config == rope), None)
        if table is None:
            table = RotaryTable(rope, max_positions, device)
            tables.append(table)
        found.append(table)
    return tuple(found)


def rotary_offset(tables: Sequence[RotaryTable | None], num_tokens: int) -> int:
    """The row of every layer's table at which the one for a sequence of ``num_tokens`` tokens begins."""
    offsets = {table.offset(num_tokens) for table in tables if table is not None} or {0}
    assert len(offsets) == 1, "long RoPE is the same in every layer"
    return offsets.pop()


def inverse_frequencies(config: RopeConfig, factor: str = "") -> Tensor:
    """float32 [rotary_dim / 2]: radians per position of each pair. ``factor`` names a long RoPE's list of divisors."""
    dim, params = config.rotary_dim, config.params
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies: Tensor = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return frequencies / float(params["factor"])
    if config.kind == "llama3":
        return _llama3(frequencies, config)
    if config.kind == "yarn":
        return _yarn(config)
    if config.kind == "longrope":
        return 1.0 / (torch.tensor(params[factor], dtype=torch.float32) * config.theta**exponents)
    if config.kind == PROPORTIONAL:
        frequencies[config.turned :] = 0
        return frequencies / float(params.get("factor") or 1)
    return frequencies


def attention_scale(config: RopeConfig) -> float:
    """The factor that yarn and long RoPE apply to cos and sin (their "attention factor")."""
    params = config.params
    given = params.get("attention_factor")
    if config.kind == "longrope":
        if given is not None:
            return float(given)
        factor = params.get("factor") or config.max_position_embeddings / config.original_max_position_embeddings
        if factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(config.original_max_position_embeddings))
    if config.kind == "yarn":
        if given is not None:
            return float(given)
        factor = params["factor"]
        mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
        if mscale and all_dim:
            return yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
        return yarn_scale(factor, 1.0)
    return 1.0


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    params, original = config.params, config.original_max_position_embeddings
    factor, low, high = (float(params[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(config: RopeConfig) -> Tensor:
    """Peng et al., "YaRN" (2023): pairs that turn often are kept, pairs that turn rarely are interpolated."""
    params, dim, original = config.params, config.rotary_dim, config.original_max_position_embeddings
    base = config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept, stretched = 1.0 / base, 1.0 / (float(params["factor"]) * base)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low = pair_that_turns(params.get("beta_fast") or 32)
    high = pair_that_turns(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return stretched * ramp + kept * (1 - ramp)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first ``rotary_dim`` dimensions of every head of ``x`` [T, heads, D]; the others are kept.

    Args:
        cos, sin: [T, 1, rotary_dim] from ``RotaryTable.angles``, in the dtype of ``x``.
        interleaved: pairs are neighbours; what comes out is [first of each pair, second of each pair].
    """
    width = cos.shape[-1]
    turned = x[..., :width]
    if interleaved:
        turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
    swapped = torch.cat((turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    rotated = swapped.mul_(sin).addcmul_(turned, cos)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)
