"""Token ids that somebody gives in the place of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpctl.client.fields import FieldError
from tpctl.errors import shown


def begins_with_id(value: Any) -> bool:
    """Whether it is to be a list of token ids: what follows is looked at by ``check_ids``."""
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Raise ``FieldError`` if a token is none of the model's, or none at all. ``vocab_size`` 0: it is not known."""
    if odd := set(map(type, ids)) - {int}:
        at, wrong = next((at, one) for at, one in enumerate(ids) if type(one) in odd)
        raise FieldError(f"{what} has {shown(wrong)} at place {at}, but begins with a token id", what)
    if ids and vocab_size and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(id for id in ids if not 0 <= id < vocab_size)
        raise FieldError(
            f"{what} holds token {shown(wrong)}, but the model knows ids 0 to {vocab_size - 1}; leave it out", what
        )
