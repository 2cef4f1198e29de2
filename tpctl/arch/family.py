"""What a model family is: how its ``config.json`` is read, and what its blocks are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpctl.arch.blueprint import Blueprint
from tpctl.arch.fields import Fields
from tpctl.errors import CheckpointError

MOST_LAYERS, MOST_HEADS, MOST_EXPERTS = 10_000, 4096, 100_000


@dataclass(frozen=True)
class Sizes:
    """The sizes that every family's config has, under the same names."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    eps: float
    tied: bool

    @classmethod
    def read(cls, fields: Fields, eps: str = "rms_norm_eps") -> Sizes:
        """Read them from a config, where ``eps`` is the field of the norms' epsilon.

        Raises:
            CheckpointError: a field is wrong.
        """
        num_heads = fields.whole("num_attention_heads", most=MOST_HEADS)
        hidden_size = fields.whole("hidden_size")
        num_layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
        vocab_size = fields.whole("vocab_size")
        head_dim = fields.optional_whole("head_dim")
        if head_dim is None and hidden_size % num_heads:
            raise CheckpointError(
                f"config.json has no head_dim, and hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_heads}"
            )
        return cls(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.optional_whole("num_key_value_heads", most=MOST_HEADS) or num_heads,
            head_dim=head_dim or hidden_size // num_heads,
            intermediate_size=fields.whole("intermediate_size"),
            vocab_size=vocab_size,
            eps=fields.number(eps, least=1e-30, most=1),
            tied=fields.flag("tie_word_embeddings"),
        )


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        architecture: the class name that ``config.json`` lists under ``architectures``.
        defaults: what fields mean that a config does not have: those of the configuration class in transformers 5.
        nullable: fields whose ``null`` that class takes for "none".
        describe: the blueprint of a config. It raises ``CheckpointError`` for a field that is wrong and
            ``UnsupportedModelError`` for one that asks for what the family does not have.
        own: fields that change a result, and that ``describe`` reads though most families do not have them.
        only: fields that published files have and no class reads, and the values that tpctl knows of them.
        others: further class names that are the same model, as one that also sees.
        inner: the field that holds those of the text model, where there is more than one.
        texts: the families that such a text model may be of, by its own ``model_type``; none: this is the only one.
        eps: the field of the norms' epsilon.
        unset: fields whose ``null`` that class takes for its default.
        runs: tpctl runs its models; otherwise it cuts them, and reads no more of a config than that takes.
    """

    architecture: str
    defaults: Mapping[str, Any]
    nullable: frozenset[str]
    describe: Callable[[Fields, Sizes], Blueprint]
    own: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    inner: str | None = None
    texts: Mapping[str, Family] = field(default_factory=dict)
    eps: str = "rms_norm_eps"
    unset: frozenset[str] = frozenset()
    runs: bool = True


COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""Defaults that most configuration classes share."""
