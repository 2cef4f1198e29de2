"""``config.json`` read strictly into a blueprint, without torch or transformers.

Every field means what the family's configuration class in transformers 5 makes of it, also where it is missing or null
(``arch.fields``, ``arch.families``). Unknown architectures, activations and RoPE kinds are refused by name, and so are
fields that would change a result and that the family does not have (``arch.foreign``) or nothing knows
(``arch.unread``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.arch import vllm
from tpctl.arch.block import Block
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import FAMILIES
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.foreign import check_fields
from tpctl.arch.formats import read_scheme
from tpctl.arch.formats.beside import FILE, told_beside
from tpctl.arch.formats.scheme import Scheme
from tpctl.arch.latent import Attending
from tpctl.arch.quantised import Cutting, cut_by, quantised
from tpctl.arch.unread import check_only, check_unread
from tpctl.errors import CheckpointError, UnsupportedModelError, shown
from tpctl.json_file import is_file, read_object
from tpctl.partition.dtypes import DTYPES

_OF_BOTH = (*("quantization_config", "compression_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id"),)
"""Fields of a model that sees which its text model may leave to it."""

_OF_WHOLE = ("architectures", "tie_word_embeddings")
"""Fields of such a model that hold, whatever its text model says."""

_CHUNKED, _ORIGINAL = "dual_chunk_attention_config", "original_max_position_embeddings"


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a checkpoint that tpctl needs to cut and run it.

    ``max_position_embeddings`` is the longest sequence that every layer takes, ``beyond`` what keeps it from a longer
    one that its file promises, for messages; ``scheme`` how its weights are stored where they are quantised.
    """

    model_type: str
    family: Family
    blueprint: Blueprint
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    cutting: Cutting = Cutting()  # noqa: RUF009 (it is frozen)
    scheme: Scheme | None = None
    beyond: str = ""

    @property
    def num_layers(self) -> int:
        return len(self.blueprint.layers)

    @property
    def vocab_size(self) -> int:
        return self.blueprint.vocab_size

    @classmethod
    def load(cls, folder: Path, cutting: Cutting = Cutting()) -> ModelConfig:
        """Read ``folder/config.json`` (and the EOS ids of ``generation_config.json``, where they differ; and the format
        of quantised weights from ``hf_quant_config.json``, where that alone tells).

        Raises:
            CheckpointError: the file is missing, not JSON, or has a wrong field.
            UnsupportedModelError: it names something tpctl does not know.
            PartitionError: the model cannot be cut as ``cutting`` says.
        """
        if not is_file(folder / "config.json"):
            raise CheckpointError(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
        raw = read_object(folder / "config.json")
        generation = read_object(folder / "generation_config.json", default={})
        return cls.from_dict(raw, generation, cutting, told_beside(folder, raw))

    @classmethod
    def from_dict(
        cls,
        raw: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        cutting: Cutting = Cutting(),
        beside: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Parse a config's dictionary; ``generation`` is that of ``generation_config.json``, ``beside`` that of
        ``hf_quant_config.json``. Errors as ``load``."""
        model_type = raw.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None or not isinstance(model_type, str):
            cut = f", and cuts {names}" if (names := _names(runs=False)) else ""
            raise UnsupportedModelError(
                f"model_type {shown(model_type)} is not supported; tpctl runs {_names(runs=True)}{cut}"
            )
        family = _text_family(raw, family)
        values = _of_text(raw, family.inner)
        values = {key: value for key, value in values.items() if value is not None or key not in family.unset}
        fields = Fields(values, family.defaults, family.nullable)
        _check_kind(fields, model_type, family)
        sizes = Sizes.read(fields, family.eps)
        if family.runs:
            foreign = {key: value for key, value in fields.values.items() if key not in family.own}
            check_fields(foreign, family.architecture, sizes.head_dim)
        check_only(fields, family)
        blueprint = family.describe(fields, sizes)
        scheme = read_scheme(fields, Fields(beside or {}, file=FILE))
        if scheme is not None:
            blueprint = quantised(blueprint, scheme)
        if cutting.engine == "vllm":
            blueprint = vllm.named(model_type, blueprint)
        if cutting.engine is not None or not cutting.predicts:
            blueprint = blueprint.without_predictor()
        blueprint = cut_by(blueprint, cutting)
        longest, beyond = _longest(blueprint, fields)
        found = cls(
            model_type=model_type,
            family=family,
            blueprint=blueprint,
            max_position_embeddings=longest,
            dtype=_dtype(fields),
            eos_token_ids=_eos(fields, Fields(generation or {}, file="generation_config.json"), sizes.vocab_size),
            bos_token_id=next(iter(_ids(fields, "bos_token_id", sizes.vocab_size)), None),
            cutting=cutting,
            scheme=scheme,
            beyond=beyond,
        )
        check_unread(fields, family)
        return found


def _names(*, runs: bool) -> str:
    return ", ".join(sorted(name for name, family in FAMILIES.items() if family.runs == runs))


def _check_kind(fields: Fields, model_type: str, family: Family) -> None:
    """Refuse what the family's decoder cannot run, whatever its sizes are."""
    architectures = fields.get("architectures") or [family.architecture]
    if not isinstance(architectures, list):
        raise fields.wrong("architectures", "a list")
    if not {family.architecture, *family.others} & set(map(str, architectures)):
        raise UnsupportedModelError(
            f"architecture {shown(architectures[0])} of model_type {shown(model_type)} is not supported; "
            f"tpctl {'runs' if family.runs else 'cuts'} {family.architecture}"
        )


def _text_family(raw: Mapping[str, Any], family: Family) -> Family:
    """``family`` with the text model that the config of one that sees names; where it names none, the usual one."""
    text = Fields(raw).inside(family.inner) if family.inner is not None else Fields({})
    kind = text.get("model_type")
    if kind is None or not family.texts:
        return family
    if kind not in family.texts:
        raise UnsupportedModelError(
            f"model_type {shown(kind)} of {family.inner} is not supported for {family.architecture}; "
            f"tpctl knows {', '.join(sorted(family.texts))}"
        )
    return family.texts[kind]


def _of_text(raw: Mapping[str, Any], inner: str | None) -> Mapping[str, Any]:
    """The fields of the text model, which one that sees has in an object of their own, beside some that are of both."""
    text = raw.get(inner) if inner is not None else None
    if not isinstance(text, dict):
        return raw
    of_both, of_whole = ({key: raw[key] for key in keys if key in raw} for keys in (_OF_BOTH, _OF_WHOLE))
    return {**of_both, **text, **of_whole, **_ends(raw, text)}


def _ends(raw: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens that end an answer, where both say some: of Gemma 4 the whole has one more than its text model."""
    both = [one["eos_token_id"] for one in (raw, text) if one.get("eos_token_id") is not None]
    if len(both) < 2:
        return {}
    return {"eos_token_id": [one for ids in both for one in (ids if isinstance(ids, list) else [ids])]}


def _longest(blueprint: Blueprint, fields: Fields) -> tuple[int, str]:
    """The longest sequence that every layer takes, as far as layers say it; ``max_position_embeddings`` otherwise. And
    what it would take to answer a longer one that the file promises; empty: it promises none."""
    ropes = [
        layer.mixer.rope
        for layer in blueprint.layers
        if isinstance(layer, Block) and isinstance(layer.mixer, Attending)
    ]
    said = [rope.longest for rope in ropes if rope is not None]
    longest = min(said) if said else fields.whole("max_position_embeddings")
    unchunked = _unchunked(fields, plain=all(rope is None or rope.kind == "default" for rope in ropes))
    if unchunked is None or longest <= unchunked:
        return longest, ""
    return (
        unchunked,
        f"from there up to {longest} it takes dual chunk attention ({_CHUNKED}), which tpctl does not have",
    )


def _unchunked(fields: Fields, plain: bool) -> int | None:
    """Up to where dual chunk attention is attention as it always is; ``None``: the config asks for none.

    Of a sequence within one chunk all positions are as far apart as they are, and scores grow only beyond
    ``original_max_position_embeddings`` (An et al., "Training-Free Long-Context Scaling", 2024; Qwen2.5-1M).

    Raises:
        CheckpointError, UnsupportedModelError: the setting is wrong, or has more than that; or RoPE is not ``plain``.
    """
    chunked = fields.inside(_CHUNKED)
    if not chunked.values:
        return None
    unknown = sorted(chunked.values.keys() - {"chunk_size", "local_size", _ORIGINAL})
    if unknown or not plain:
        what = f"with {shown(unknown[0])}" if unknown else "beside a RoPE that is stretched"
        raise UnsupportedModelError(
            f"config.json: {_CHUNKED} {what} is not supported; to run the model without dual chunk attention remove "
            "the field, and set max_position_embeddings to the length that it takes so"
        )
    chunked.optional_whole("local_size")
    return min(chunked.whole("chunk_size", least=2), chunked.whole(_ORIGINAL, least=2))


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
    given = fields.get(key)
    if key not in fields and any(one >= vocab_size for one in (given if isinstance(given, list) else [given or 0])):
        return []
    return fields.token_ids(key, vocab_size)
