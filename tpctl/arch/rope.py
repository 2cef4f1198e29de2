"""The RoPE settings of a ``config.json``, as transformers 5 understands them.

Both layouts are read: ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters`` (transformers 5).
Unknown kinds are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpctl.arch.fields import Fields
from tpctl.arch.windows import FULL, SLIDING
from tpctl.errors import CheckpointError, UnsupportedModelError, counted, shown

MOST_POSITIONS = 2**25
"""Longest sequence that a config may promise; the longest that is published has 10^7 tokens."""

ROPE_KINDS = {kind: kind for kind in ("default", "linear", "llama3", "yarn", "longrope")}
"""The kinds there are, by the names that a config gives them."""

BY_LAYER = {kind: kind for kind in ROPE_KINDS if kind != "longrope"}
"""Those that layers may have beside others: with long RoPE all keys of a sequence change together."""

PROPORTIONAL = "proportional"
"""Of Gemma 4 alone: pairs are those of the whole head, and of these the first, ``partial_rotary_factor`` of them, turn,
as fast as they would if all did."""

_TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Fields that transformers 4 kept beside ``rope_scaling``, or in it."""

_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor")
_READ = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (*_OPTIONAL, "truncate"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
    PROPORTIONAL: ("factor",),
}
"""What a kind reads. transformers drops the rest, with a warning at most."""
_NEUTRAL = ("factor", "attention_factor")
"""Where it is 1 it changes nothing, whatever reads it."""
_SAYS_NOTHING = ("finetuned",)
"""In published configs, and read by nobody."""
_STRETCHED = ("llama3", "yarn", "longrope")
"""Kinds that ask for the length before they were stretched."""

_FOREIGN = ("attn_factor", "extrapolation_factor", "short_mscale", "long_mscale")
"""Read by other engines, not by transformers; 1 changes nothing."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: ``kind`` is one of ``ROPE_KINDS``; ``params`` holds that kind's own numbers.

    ``interleaved``: neighbouring dimensions are pairs, instead of those that are half of ``rotary_dim`` apart.
    ``turned``: how many pairs turn, from the first on; the others stay. ``None``: all.
    ``growth``: (beta, length): a query at position p is multiplied by ``1 + beta * log(1 + floor(p / length))``.
    """

    kind: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    params: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    turned: int | None = None
    growth: tuple[float, int] | None = None

    @property
    def longest(self) -> int:
        """Positions that the model takes. The factors of linear and yarn extend them, without changing the other
        fields of a config; those of llama3 and long RoPE are in ``max_position_embeddings`` already."""
        if self.kind == "linear":
            return max(1, int(self.max_position_embeddings * float(self.params["factor"])))
        if self.kind == "yarn":
            stretched = int(self.original_max_position_embeddings * float(self.params["factor"]))
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings


def yarn_scale(factor: float, mscale: float) -> float:
    """By how much YaRN raises scores in a context ``factor`` times as long (Peng et al., "YaRN", 2023)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_rope(
    fields: Fields,
    architecture: str,
    head_dim: int,
    *,
    kinds: Mapping[str, str] = ROPE_KINDS,
    partial: bool = False,
    interleaved: bool = False,
    unread: Collection[str] = (),
) -> RopeConfig:
    """The RoPE settings of a config with heads of ``head_dim`` dimensions.

    Args:
        kinds: those that the family takes, by the names that it gives them.
        partial: a head's rotated dimensions may be fewer than all (``partial_rotary_factor``).
        interleaved: as of ``RopeConfig``.
        unread: settings that say nothing of text.

    Raises:
        CheckpointError: a number is missing, wrong, or contradicts another one.
        UnsupportedModelError: the kind is unknown, or one that the family does not have.
    """
    raw = {name: value for name, value in _params(fields).items() if name not in unread}
    kind = raw.pop("rope_type", None) or raw.get("type") or "default"
    raw.pop("type", None)
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(sorted(set(kinds.values())))
        raise UnsupportedModelError(f"RoPE kind {shown(kind)} is not supported for {architecture}; tpctl knows {known}")
    kind = kinds[kind]
    params = fields.within(raw)
    theta = (params if "rope_theta" in params else fields).number("rope_theta", least=2, most=1e18)
    share = _share(fields, params, architecture, partial or kind == PROPORTIONAL)
    rotary_dim = head_dim if kind == PROPORTIONAL else int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(f"config.json: {rotary_dim} rotated dimensions a head do not form pairs")
    positions = fields.whole("max_position_embeddings", most=MOST_POSITIONS)
    original = _original(fields, params, architecture, positions) if kind in _STRETCHED else positions
    if kind == "yarn" and raw.get("factor", ...) is None:
        raw["factor"] = positions / original
    for key in _TOP_LEVEL:
        raw.pop(key, None)
    _check(kind, params, rotary_dim // 2)
    turned = int(share * head_dim // 2) if kind == PROPORTIONAL else None
    rope = RopeConfig(kind, theta, rotary_dim, positions, original, raw, interleaved, turned)
    if rope.longest > MOST_POSITIONS:
        raise CheckpointError(
            f"config.json: a RoPE factor of {shown(raw['factor'])} makes {rope.longest} positions, "
            f"but at most {MOST_POSITIONS} are supported"
        )
    return rope


def read_rope_of(
    layers: str,
    fields: Fields,
    architecture: str,
    head_dim: int,
    theta: Any,
    kinds: Mapping[str, str] = BY_LAYER,
) -> RopeConfig:
    """The RoPE settings of one kind of layers, ``SLIDING`` or ``FULL``, of a family whose ``rope_parameters`` hold
    both. ``rope_scaling``, of older files, is of those with full attention.

    Args:
        theta: their ``rope_theta`` where these say none.
        kinds: as of ``read_rope``.

    Raises:
        CheckpointError, UnsupportedModelError: as ``read_rope``; or the parameters are not by layer type.
    """
    values = {"max_position_embeddings": fields.get("max_position_embeddings"), "rope_theta": theta}
    both = fields.mapping("rope_parameters")
    if unknown := sorted(both.keys() - {SLIDING, FULL}):
        raise CheckpointError(
            f"config.json: rope_parameters has {shown(unknown[0])}, but the RoPE of {SLIDING} and of {FULL} are needed"
        )
    if both.get(layers) is not None:
        values["rope_parameters"] = fields.within(both).mapping(layers)
    if layers == FULL and fields.get("rope_scaling") is not None:
        values["rope_scaling"] = fields.get("rope_scaling")
    return read_rope(fields.within(values), architecture, head_dim, kinds=kinds)


def _params(fields: Fields) -> dict[str, Any]:
    """The RoPE settings, from whichever layout the file has.

    A file with both must say one thing: transformers 5 lets the older field win, which whoever edited the newer one
    does not expect.
    """
    new, old = fields.mapping("rope_parameters"), fields.mapping("rope_scaling")
    if not new or not old:
        return new or old
    for params in (new, old):
        params["rope_type"] = params.pop("rope_type", None) or params.pop("type", None) or "default"
        params.pop("type", None)
    for name in sorted(new.keys() | old.keys()):
        values = [params.get(name, fields.get(name)) for params in (new, old)]
        if values[0] != values[1] and not (name in _TOP_LEVEL and None in values):
            raise CheckpointError(
                f"config.json has rope_parameters and rope_scaling, and their {name} differs: {shown(values[0])} and "
                f"{shown(values[1])}; keep the one that is meant"
            )
    return new


def _share(fields: Fields, params: Fields, architecture: str, partial: bool) -> float:
    """The share of a head's dimensions that is rotated."""
    key = "partial_rotary_factor"
    holder = params if key in params else fields
    unsaid = key not in holder and key not in fields.defaults
    if holder.get(key) is None and (not partial or key in fields.nullable or unsaid):
        return 1.0
    share = holder.number(key, least=1e-6, most=1)
    if share != 1 and not partial:
        raise UnsupportedModelError(f"{key} {share} is not supported for {architecture}")
    return share


def _original(fields: Fields, params: Fields, architecture: str, positions: int) -> int:
    """The length before it was stretched. transformers lets the field beside the RoPE settings win over that in them,
    also where it is only its class's default; tpctl wants them equal."""
    key = "original_max_position_embeddings"
    inner = params.whole(key, most=MOST_POSITIONS) if key in params else None
    outer = fields.whole(key, most=MOST_POSITIONS) if key in fields or key in fields.defaults else None
    if inner is not None and outer is not None and inner != outer:
        where = "beside it" if key in fields else f"that {architecture} has where the config gives none"
        raise CheckpointError(
            f"config.json: the RoPE settings' {key} is {inner}, but the one {where} is {outer}; write the one that is "
            "meant into both places"
        )
    return outer or inner or positions


def _check(kind: str, params: Fields, pairs: int) -> None:
    """Refuse numbers that would make a wrong table, or none."""
    nested = [name for name, value in params.values.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(f"RoPE parameters by layer type ({shown(nested[0])}) are not supported")
    if foreign := [name for name in _FOREIGN if params.get(name) not in (None, 1)]:
        name = foreign[0]
        raise UnsupportedModelError(
            f"config.json: the RoPE setting {name} ({shown(params.get(name))}) is not supported"
        )
    for name, value in params.values.items():
        neutral = value is None or name in _SAYS_NOTHING or (value == 1 and name in (*_NEUTRAL, *_FOREIGN))
        if name not in _READ.get(kind, ()) and not neutral:
            raise UnsupportedModelError(
                f"config.json: the RoPE setting {shown(name)} ({shown(value)}) is not read by the kind {shown(kind)}; "
                "correct rope_type, or remove the setting if it has no meaning"
            )
    needed = _NEEDED.get(kind, ())
    if missing := [name for name in needed if name not in params]:
        raise CheckpointError(f"config.json: RoPE kind {shown(kind)} needs {shown(missing[0])}, which is not there")
    if kind == "default":
        return
    for name in needed:
        if name in ("short_factor", "long_factor"):
            _check_list(name, params, pairs)
        else:
            params.number(name, least=1e-3, most=1e6)
    for name in _OPTIONAL:
        if params.get(name) is not None:
            params.number(name, least=0 if name.startswith("mscale") else 1e-3, most=1e6)
    if params.get("truncate") is not None:
        params.flag("truncate")
    if kind == "llama3" and params.values["low_freq_factor"] >= params.values["high_freq_factor"]:
        low, high = params.values["low_freq_factor"], params.values["high_freq_factor"]
        raise CheckpointError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")


def _check_list(name: str, params: Fields, pairs: int) -> None:
    value = params.get(name)
    if not isinstance(value, list) or len(value) != pairs:
        held = f"has {counted(len(value), 'number')}" if isinstance(value, list) else f"is {shown(value)}"
        raise CheckpointError(f"config.json: {name} {held}, but a head has {counted(pairs, 'rotated pair')}")
    for number in value:
        params.within({name: number}).number(name, least=1e-3, most=1e6)
