"""``config.json`` read strictly into frozen dataclasses, without torch or transformers.

Every field means what the family's configuration class in transformers 5 makes of it, also where it is missing or null
(``models.fields``, ``models.specs``). Unknown architectures, activations and RoPE kinds are refused by name, and so
are fields that would change a result and that the family does not have (``models.foreign``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.arch.families import ACTIVATIONS, DTYPES, FAMILIES, MOST_HEADS, MOST_LAYERS, FamilySpec
from tpctl.arch.fields import Fields
from tpctl.arch.foreign import check_fields
from tpctl.arch.rope import RopeConfig as RopeConfig
from tpctl.arch.rope import read_rope
from tpctl.errors import CheckpointError, UnsupportedModelError, counted, shown
from tpctl.json_file import is_file, read_object
from tpctl.partition.plan import Geometry


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a checkpoint that tpctl needs to cut and run it.

    ``windows`` has one entry a layer: the sliding window in tokens (the token itself counted), or ``None``.
    """

    model_type: str
    family: FamilySpec
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.num_heads, self.num_kv_heads, self.head_dim, self.vocab_size)

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
        head_dim = head_dim or hidden_size // num_heads
        check_fields(raw, family.architecture, head_dim)
        rope = read_rope(fields, family, head_dim)
        return cls(
            model_type=model_type,
            family=family,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.optional_whole("num_key_value_heads", most=MOST_HEADS) or num_heads,
            head_dim=head_dim,
            intermediate_size=fields.whole("intermediate_size"),
            vocab_size=vocab_size,
            rms_norm_eps=fields.number("rms_norm_eps", least=1e-30, most=1),
            max_position_embeddings=rope.longest,
            rope=rope,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=_switch(family.qkv_bias, fields),
            o_bias=_switch(family.o_bias, fields),
            mlp_bias=_switch(family.mlp_bias, fields),
            windows=_windows(fields, family, num_layers, rope.longest),
            dtype=_dtype(fields),
            eos_token_ids=_eos(fields, Fields(generation or {}, file="generation_config.json"), vocab_size),
            bos_token_id=next(iter(_ids(fields, "bos_token_id", vocab_size)), None),
        )


def _check_kind(fields: Fields, model_type: str, family: FamilySpec) -> None:
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
    activation = fields.get("hidden_act")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation {shown(activation)} is not supported (hidden_act); tpctl knows silu")


def _switch(rule: bool | str, fields: Fields) -> bool:
    return fields.flag(rule) if isinstance(rule, str) else rule


def _windows(fields: Fields, family: FamilySpec, num_layers: int, longest: int) -> tuple[int | None, ...]:
    """Each layer's sliding window."""
    kinds = _layer_kinds(fields, num_layers)
    used = family.window != "layers" or fields.flag("use_sliding_window")
    window = fields.optional_whole("sliding_window") if used else None
    if family.window == "layers" and kinds is None:
        first = fields.whole("max_window_layers", least=0) if window is not None else 0
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family.window == "none" and window is not None:
        # transformers masks nothing by it, but its cache drops what lies further back, once an answer is generated.
        if window < longest:
            raise UnsupportedModelError(
                f"config.json: sliding_window is {window}, which {family.architecture} does not have, and engines "
                f"differ in what they make of it; set it to null, or to the model's {longest} positions or more"
            )
        window = None
    if kinds is None:
        return (window,) * num_layers
    if window is None and "sliding_attention" in kinds:
        raise CheckpointError("config.json: layer_types names sliding_attention, but no sliding_window is in use")
    if window is not None and family.window == "always" and "full_attention" in kinds:
        raise UnsupportedModelError(
            f"config.json: layer_types names full_attention, but {family.architecture} has its sliding_window "
            f"({window}) in every layer; remove layer_types, or correct model_type"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_kinds(fields: Fields, num_layers: int) -> list[str] | None:
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise fields.wrong("layer_types", "a list")
    if unknown := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
        raise UnsupportedModelError(
            f"layer type {shown(unknown[0])} is not supported; tpctl knows full and sliding attention"
        )
    if len(kinds) != num_layers:
        raise CheckpointError(
            f"config.json: layer_types has {counted(len(kinds), 'kind')} for {counted(num_layers, 'layer')}"
        )
    return kinds


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
