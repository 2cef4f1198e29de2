"""Fields of a config that nothing has read: one whose name is about what a model computes is refused by name.

transformers leaves such a field unread, too, and a model that was trained with it would answer wrongly without a word.
What a family's class in transformers defines is known, read or not, and so is what the family says that its published
files have besides (``Family.only``). ``arch.foreign`` refuses fields of other families by their own names, also those
that common code reads.
"""

from __future__ import annotations

import re
from typing import Any

from tpctl.arch.family import Family
from tpctl.arch.fields import Fields
from tpctl.arch.foreign import neutral_values
from tpctl.errors import UnsupportedModelError, shown

_SCALES = {"scale", "scales", "scaling", "scaled", "multiplier", "multipliers", "factor", "factors"}
_AT_ONE = _SCALES | {"beta", "mod"}
"""Words of names whose value changes nothing where it is 1."""

_COMPUTES = _SCALES | {
    *("bias", "biases", "norm", "norms", "layernorm", "rmsnorm", "ln", "eps", "epsilon"),
    *("softcap", "softcapping", "cap", "caps", "capping", "clip", "clamp", "limit", "window", "windows", "temperature"),
    *("attn", "attention", "attentions", "qk", "qkv", "head", "heads", "logit", "logits", "sink", "sinks", "causal"),
    *("residual", "residuals", "parallel", "activation", "gate", "gates", "gated", "gating", "mixer", "mamba", "ssm"),
    *("conv", "recurrent", "expert", "experts", "moe", "router", "routed", "routing"),
}
"""Words of names, between underscores, that are about computing."""

_ROTATES = re.compile(r"(^|_)[mx]?rope(_|$)|rotary|alibi|softcap")

_IDLE = re.compile(
    r"_.*"  # what a class of transformers keeps for itself
    r"|.*dropout.*|.*_pdrop|.*layerdrop.*"  # of training
    r"|(.*_)?(aux|z)_loss.*|.*_coeff?(icient)?|.*jitter.*|initializer_.*|.*_init(ializer)?(_.*)?|.*capacity_factor"
    r"|output_.*|return_.*"  # what is given back
    r"|_?att(entio)?n_implementation.*|_?(use_)?(sdpa|flash)_att(entio)?n.*|.*attention_backend"  # how, not what
    r"|(expert|tensor|pipeline|context|data|model|sequence)_(model_)?parallel.*|(use_)?parallel_embedding"
    r"|ffn_dim_multiplier|temperature"  # of the intermediate size, which is there; and of sampling
    r"|max_window_layers"  # of use_sliding_window
)
"""Names with such a word, of what changes no answer."""


def check_only(fields: Fields, family: Family) -> None:
    """Refuse another value of a field than the family's published files have, of those that no class reads.

    Raises:
        UnsupportedModelError: there is one; the message names it.
    """
    for key, values in family.only.items():
        given = fields.get(key)
        if any(one is not None and one not in values for one in (given if isinstance(given, list) else [given])):
            known = " and ".join(map(shown, values))
            raise UnsupportedModelError(
                f"config.json: {key} is {shown(given)}, but {family.architecture} knows {known} alone; "
                "correct model_type, or remove the field if it has no meaning"
            )


def check_unread(fields: Fields, family: Family) -> None:
    """Refuse a config with a field that nothing of the family has read and that could change its results.

    Raises:
        UnsupportedModelError: there is one; the message names it.
    """
    known = fields.read.union(family.defaults, family.nullable, family.unset, family.own, family.only)
    for key, value in fields.values.items():
        if key in known or neutral_values(key) is not None:
            continue
        if _is_computed_with(key) and not _says_nothing(key, value):
            raise UnsupportedModelError(
                f"config.json: {key} is {shown(value)}, which tpctl does not know of {family.architecture}; left out, "
                "it could change every result. Correct model_type, or remove the field if it has no meaning"
            )


def _is_computed_with(key: str) -> bool:
    name = key.lower()
    if _IDLE.fullmatch(name):
        return False
    return bool(_words(name) & _COMPUTES or _ROTATES.search(name))


def _says_nothing(key: str, value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(_says_nothing(key, one) for one in (value.values() if isinstance(value, dict) else value))
    if not value:
        return True
    return value == 1 and not isinstance(value, bool) and bool(_words(key.lower()) & _AT_ONE)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name))
