"""Gemma 3: norms before and behind attention and MLP; most layers have a window and a RoPE of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpctl.arch import parts
from tpctl.arch.block import Activation, Block
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import RopeConfig, read_rope
from tpctl.arch.seeing import seeing
from tpctl.arch.windows import by_kind, layer_kinds
from tpctl.errors import CheckpointError, UnsupportedModelError, shown

ARCHITECTURE, SEES = "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}
SLIDING, FULL = "sliding_attention", "full_attention"
MOST_CAP = 1e6


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields, "hidden_activation", ACTIVATIONS)
    for key in ("use_bidirectional_attention", "attn_logit_softcapping"):  # of which transformers applies no cap
        if fields.get(key):
            raise UnsupportedModelError(f"config.json: {key} is {shown(fields.get(key))}, which is not supported")
    kinds = layer_kinds(fields, sizes.num_layers) or _by_pattern(fields, sizes.num_layers)
    window = fields.optional_whole("sliding_window")
    if window is None and SLIDING in kinds:
        raise CheckpointError("config.json: layers have sliding attention, but no sliding_window is in use")
    ropes = {kind: _rope(fields, sizes, kind) for kind in (SLIDING, FULL)}
    scale = fields.number("query_pre_attn_scalar", least=1e-3, most=1e6) ** -0.5
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, activation)
    blocks = tuple(
        parts.sandwich(
            sizes,
            parts.attention(
                sizes, ropes[kind], span, qkv_bias=bias, o_bias=bias, qk_norm=True, unit_offset=True, scale=scale
            ),
            mlp,
        )
        for kind, span in zip(kinds, by_kind(kinds, window), strict=True)
    )
    return model(fields, sizes, blocks)


def model(fields: Fields, sizes: Sizes, blocks: tuple[Block, ...]) -> Blueprint:
    """A model of Gemma's: scaled embeddings, and logits that may be capped."""
    return Blueprint(
        sizes.vocab_size,
        sizes.hidden_size,
        blocks,
        parts.offset_norm(sizes, "model.norm"),
        sizes.tied,
        embedding_scale=sizes.hidden_size**0.5,
        logit_softcap=read_cap(fields, "final_logit_softcapping"),
    )


def read_cap(fields: Fields, key: str) -> float | None:
    """What scores or logits are capped at; ``None``: nothing."""
    return None if fields.get(key) is None else fields.number(key, least=1e-3, most=MOST_CAP)


def _by_pattern(fields: Fields, num_layers: int) -> list[str]:
    """The layers' kinds where no ``layer_types`` says them: every sixth has full attention."""
    every = fields.whole("sliding_window_pattern")
    return [SLIDING if (layer + 1) % every else FULL for layer in range(num_layers)]


def _rope(fields: Fields, sizes: Sizes, kind: str) -> RopeConfig:
    """The RoPE of one kind of layers. ``rope_scaling``, of older files, is of those with full attention."""
    theta = "rope_theta" if kind == FULL else "rope_local_base_freq"
    values: dict[str, Any] = {"max_position_embeddings": fields.get("max_position_embeddings")}
    values["rope_theta"] = fields.get(theta)
    both = fields.mapping("rope_parameters")
    if unknown := sorted(both.keys() - {SLIDING, FULL}):
        raise CheckpointError(
            f"config.json: rope_parameters has {shown(unknown[0])}, but the RoPE of {SLIDING} and of {FULL} are needed"
        )
    if both.get(kind) is not None:
        values["rope_parameters"] = fields.within(both).mapping(kind)
    if kind == FULL and fields.get("rope_scaling") is not None:
        values["rope_scaling"] = fields.get("rope_scaling")
    return read_rope(fields.within(values), ARCHITECTURE, sizes.head_dim)


FAMILY = Family(
    ARCHITECTURE,
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    frozenset({"sliding_window"}),
    describe,
    own=frozenset(
        {
            *("hidden_activation", "query_pre_attn_scalar", "sliding_window_pattern", "use_bidirectional_attention"),
            *("attn_logit_softcapping", "final_logit_softcapping"),
        }
    ),
)


def _describe_seeing(fields: Fields, sizes: Sizes) -> Blueprint:
    """The text of a model that sees, of which transformers does not cap the logits."""
    if (cap := fields.get("final_logit_softcapping")) is not None:
        raise UnsupportedModelError(
            f"config.json: final_logit_softcapping is {shown(cap)}, which {SEES} does not apply; set it to null"
        )
    return describe(fields, sizes)


SEEING = seeing(
    SEES, {"gemma3_text": replace(FAMILY, describe=_describe_seeing)}, ("vision_tower", "multi_modal_projector")
)
