"""``config.json`` read strictly into a blueprint, without torch or transformers.

Every field means what the family's configuration class in transformers 5 makes of it, also where it is missing or null
(``arch.fields``, ``arch.families``). Unknown architectures, activations and RoPE kinds are refused by name, and so are
fields that would change a result and that the family does not have (``arch.foreign``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import FAMILIES
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.foreign import check_fields
from tpctl.errors import CheckpointError, UnsupportedModelError, shown
from tpctl.json_file import is_file, read_object
from tpctl.partition.dtypes import DTYPES


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a checkpoint that tpctl needs to cut and run it.

    ``max_position_embeddings`` is the longest sequence that every layer takes.
    """

    model_type: str
    family: Family
    blueprint: Blueprint
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def num_layers(self) -> int:
        return len(self.blueprint.blocks)

    @property
    def vocab_size(self) -> int:
        return self.blueprint.vocab_size

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json`` (and the EOS ids of ``generation_config.json``, where they differ).

        Raises:
            CheckpointError: the file is missing, not JSON, or has a wrong field.
            UnsupportedModelError: it names something tpctl does not know.
        """
        if not is_file(folder / "config.json"):
            raise CheckpointError(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
        raw = read_object(folder / "config.json")
        return cls.from_dict(raw, read_object(folder / "generation_config.json", default={}))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Parse a config's dictionary; ``generation`` is that of ``generation_config.json``. Errors as ``load``."""
        model_type = raw.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None or not isinstance(model_type, str):
            raise UnsupportedModelError(
                f"model_type {shown(model_type)} is not supported; tpctl knows {', '.join(sorted(FAMILIES))}"
            )
        fields = Fields(raw, family.defaults, family.nullable)
        _check_kind(fields, model_type, family)
        sizes = Sizes.read(fields)
        foreign = {key: value for key, value in raw.items() if key not in family.own}
        check_fields(foreign, family.architecture, sizes.head_dim)
        blueprint = family.describe(fields, sizes)
        return cls(
            model_type=model_type,
            family=family,
            blueprint=blueprint,
            max_position_embeddings=min(block.attention.rope.longest for block in blueprint.blocks),
            dtype=_dtype(fields),
            eos_token_ids=_eos(fields, Fields(generation or {}, file="generation_config.json"), sizes.vocab_size),
            bos_token_id=next(iter(_ids(fields, "bos_token_id", sizes.vocab_size)), None),
        )


def _check_kind(fields: Fields, model_type: str, family: Family) -> None:
    """Refuse what the family's decoder cannot run, whatever its sizes are."""
    architectures = fields.get("architectures") or [family.architecture]
    if not isinstance(architectures, list):
        raise fields.wrong("architectures", "a list")
    if family.architecture not in architectures:
        raise UnsupportedModelError(
            f"architecture {shown(architectures[0])} of model_type {shown(model_type)} is not supported; "
            f"tpctl runs {family.architecture}"
        )
    for key in ("quantization_config", "compression_config"):
        if quantization := fields.mapping(key):
            method = quantization.get("quant_method") or quantization.get("format") or "unknown"
            raise UnsupportedModelError(
                f"the checkpoint is quantised ({shown(method)}), which is not supported yet; "
                "use its unquantised original"
            )


def _dtype(fields: Fields) -> str:
    given = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    dtype = given.removeprefix("torch.") if isinstance(given, str) else ""
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"dtype {shown(dtype or given)} is not supported; tpctl knows {', '.join(DTYPES)}")
    return dtype


def _eos(fields: Fields, generation: Fields, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: those of both files; the class's default only where neither says anything."""
    ids = generation.token_ids("eos_token_id", vocab_size)
    if "eos_token_id" in fields or not ids:
        ids = _ids(fields, "eos_token_id", vocab_size) + ids
    return tuple(dict.fromkeys(ids))


def _ids(fields: Fields, key: str, vocab_size: int) -> list[int]:
    """The token ids of a field; a default that the vocabulary does not reach, as that of a shortened one, is none."""
    if key not in fields and (fields.get(key) or 0) >= vocab_size:
        return []
    return fields.token_ids(key, vocab_size)
