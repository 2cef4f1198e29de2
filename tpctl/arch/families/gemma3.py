"""Gemma 3: norms before and behind attention and MLP; most layers have a window and a RoPE of their own."""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import parts
from tpctl.arch.block import Activation, Block
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope_of
from tpctl.arch.seeing import seeing
from tpctl.arch.windows import FULL, SLIDING, full_every, layer_kinds, mixed_windows
from tpctl.errors import UnsupportedModelError, shown

ARCHITECTURE, SEES = "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}
MOST_CAP = 1e6


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields, "hidden_activation", ACTIVATIONS)
    for key in ("use_bidirectional_attention", "attn_logit_softcapping"):  # of which transformers applies no cap
        if fields.get(key):
            raise UnsupportedModelError(f"config.json: {key} is {shown(fields.get(key))}, which is not supported")
    kinds = layer_kinds(fields, sizes.num_layers)
    if kinds is None:
        kinds = full_every(fields.whole("sliding_window_pattern"), sizes.num_layers)
    windows = mixed_windows(fields, kinds)
    thetas = {SLIDING: fields.get("rope_local_base_freq"), FULL: fields.get("rope_theta")}
    ropes = {kind: read_rope_of(kind, fields, ARCHITECTURE, sizes.head_dim, theta) for kind, theta in thetas.items()}
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
        for kind, span in zip(kinds, windows, strict=True)
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
        rounds_scale=True,
        logit_softcap=read_cap(fields, "final_logit_softcapping"),
    )


def read_cap(fields: Fields, key: str) -> float | None:
    """What scores or logits are capped at; ``None``: nothing."""
    return None if fields.get(key) is None else fields.number(key, least=1e-3, most=MOST_CAP)


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
