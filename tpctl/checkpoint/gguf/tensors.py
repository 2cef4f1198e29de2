"""Which tensor of a GGUF becomes which weight of a checkpoint: every weight filled, every tensor used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.checkpoint.gguf.config import Architecture
from tpctl.checkpoint.gguf.header import GgufError, GgufTensor
from tpctl.checkpoint.gguf.metadata import OTHER
from tpctl.checkpoint.gguf.rope import ROPE_TENSORS
from tpctl.errors import shorten

_EXPERT = re.compile(r"blk\.\d+\.(ffn_\w+_exps|ffn_\w+_shexp|ffn_gate_inp\w*|ffn_(gate|up|down)\.\d+)\.\w+")
_OLD_TABLE = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
"""RoPE's frequencies, which the first converters stored beside what they follow from."""

_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Weight:
    """A weight ``name`` of ``shape``, to be made of ``tensor``.

    Attributes:
        heads: of a query's or key's rows that alternate between the halves of each of so many heads; else 0.
        added: what was added to every value when the file was made.
    """

    name: str
    shape: tuple[int, ...]
    tensor: GgufTensor
    heads: int
    added: float = 0.0


def match_tensors(
    arch: Architecture, config: Mapping[str, Any], vocab_size: int, tensors: Mapping[str, GgufTensor]
) -> tuple[Weight, ...]:
    """The weights of the model that ``config`` describes.

    Raises:
        GgufError: a tensor is missing, of another shape, or has no place in the model.
    """
    if not tensors:
        raise GgufError("it holds no tensors, so it is a vocabulary alone; pass the model's file")
    if experts := sorted(name for name in tensors if _EXPERT.fullmatch(name)):
        raise GgufError(
            f"it is a mixture of experts ({len(experts)} tensors as {experts[0]}), which is not supported; use a dense "
            "model"
        )
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise GgufError(f"it would have {config['num_hidden_layers']} layers; download it again")
    wanted = tuple(_wanted(arch, config, vocab_size))
    missing = [name for name, *_ in wanted if name not in tensors]
    if missing:
        raise GgufError(
            f"it lacks {_some(missing)} of the {len(wanted)} tensors of its architecture; download it again"
        )
    used = {name for name, *_ in wanted} | ROPE_TENSORS
    unused = [name for name in tensors if name not in used and not _OLD_TABLE.fullmatch(name)]
    if unused:
        raise GgufError(f"it holds {_some(unused)} tensors that have no place in its architecture; {OTHER}")
    weights = []
    for name, target, shape, heads in wanted:
        found = tensors[name].shape
        if found != shape:
            raise GgufError(f"tensor {name} is of shape {list(found)}, but its settings make it {list(shape)}")
        added = 1.0 if arch.sandwich and name.endswith("norm.weight") else 0.0
        weights.append(Weight(target, shape, tensors[name], heads, added))
    return tuple(weights)


_Wanted = tuple[str, str, tuple[int, ...], int]


def _wanted(arch: Architecture, config: Mapping[str, Any], vocab_size: int) -> Iterator[_Wanted]:
    """Each tensor's name in the file and in the checkpoint, its shape, and the heads of alternating rows."""
    hidden = config["hidden_size"]
    yield "token_embd.weight", "model.embed_tokens.weight", (vocab_size, hidden), 0
    for layer in range(config["num_hidden_layers"]):
        for name, target, shape, heads in _layer(arch, config):
            yield f"blk.{layer}.{name}", f"model.layers.{layer}.{target}", shape, heads
    yield "output_norm.weight", "model.norm.weight", (hidden,), 0
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (vocab_size, hidden), 0


def _layer(arch: Architecture, config: Mapping[str, Any]) -> Iterator[_Wanted]:
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = heads * head_dim, kv_heads * head_dim
    yield "attn_norm.weight", "input_layernorm.weight", (hidden,), 0
    if arch.sandwich:
        yield "post_attention_norm.weight", "post_attention_layernorm.weight", (hidden,), 0
        yield "post_ffw_norm.weight", "post_feedforward_layernorm.weight", (hidden,), 0
    before = "pre_feedforward_layernorm" if arch.sandwich else "post_attention_layernorm"
    yield "ffn_norm.weight", f"{before}.weight", (hidden,), 0
    linears: list[tuple[str, str, int, int, int]] = [("attn_output", "self_attn.o_proj", hidden, q, 0)]
    if arch.fused:
        linears.append(("attn_qkv", "self_attn.qkv_proj", q + 2 * kv, hidden, 0))
        linears.append(("ffn_up", "mlp.gate_up_proj", 2 * width, hidden, 0))
    else:
        linears.append(("attn_q", "self_attn.q_proj", q, hidden, heads if arch.interleaved else 0))
        linears.append(("attn_k", "self_attn.k_proj", kv, hidden, kv_heads if arch.interleaved else 0))
        linears.append(("attn_v", "self_attn.v_proj", kv, hidden, 0))
        linears.append(("ffn_gate", "mlp.gate_proj", width, hidden, 0))
        linears.append(("ffn_up", "mlp.up_proj", width, hidden, 0))
    linears.append(("ffn_down", "mlp.down_proj", hidden, width, 0))
    for name, target, rows, columns, halves in linears:
        yield f"{name}.weight", f"{target}.weight", (rows, columns), halves
        if _has_bias(arch, config, name):
            yield f"{name}.bias", f"{target}.bias", (rows,), halves
    if arch.qk_norm:
        yield "attn_q_norm.weight", "self_attn.q_norm.weight", (head_dim,), 0
        yield "attn_k_norm.weight", "self_attn.k_norm.weight", (head_dim,), 0


def _has_bias(arch: Architecture, config: Mapping[str, Any], name: str) -> bool:
    if arch.qkv_bias:
        return name in ("attn_q", "attn_k", "attn_v")
    return bool(config.get("attention_bias" if name.startswith("attn") else "mlp_bias"))


def _some(names: list[str]) -> str:
    """How many there are, and the first of them: ``4 (blk.0.attn_q.weight, …)``."""
    shown = ", ".join(shorten(name, 60) for name in names[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})"
