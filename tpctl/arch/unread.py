"""Fields of a config that nothing has read: one that could be about what a model computes is refused by name.

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

_SCALES = {
    *("scale", "scales", "scaling", "scaled", "multiplier", "multipliers", "mult", "mults", "factor", "factors"),
}
_AT_ONE = _SCALES | {"beta", "mod", "interval"}
"""Words of names whose value changes nothing where it is 1."""

_COMPUTES = _SCALES | {
    *("bias", "biases", "norm", "norms", "layernorm", "rmsnorm", "ln", "eps", "epsilon", "offset", "offsets"),
    *("softcap", "softcapping", "cap", "caps", "capping", "clip", "clamp", "limit", "window", "windows", "temperature"),
    *("attn", "attention", "attentions", "qk", "qkv", "head", "heads", "logit", "logits", "sink", "sinks", "causal"),
    *("residual", "residuals", "parallel", "activation", "gate", "gates", "gated", "gating", "mixer", "mamba", "ssm"),
    *("conv", "recurrent", "expert", "experts", "moe", "router", "routed", "routing", "softmax", "shift", "shifts"),
    *("interval", "interleaved", "layer", "layers", "block", "blocks", "nope", "act", "activations", "adapter"),
    *("share", "shared", "sharing", "tie", "tied", "embed", "embedding", "embeddings", "skip", "merge", "merged"),
    *("dual", "chunk", "chunks", "chunked"),
}
"""Words of names, between underscores, that are about computing."""

_ROTATES = re.compile(r"(^|_)[mx]?rope(_|$)|rotary|alibi|softcap")

_IDLE = re.compile(
    r"_.*"  # what a class of transformers keeps for itself
    r"|.*dropout.*|.*_pdrop|.*layerdrop.*|(.*_)?loss(_.*)?|.*_coeff?(icient)?|.*jitter.*|initializer_.*"  # of training
    r"|.*_init(ializer)?(_.*)?|.*capacity_factor|(train|optim|adam|warmup|eval_|logging_|save_|grad_|gradient_).*"
    r"|(.*_)?(lr|seed|epochs?|learning_rate|weight_decay|batch_size)|lr_.*|label_smoothing.*"
    r"|(num|max|total|global)_(train(ing)?_)?steps|(num_)?(frozen|freeze|unfreeze|trainable)_.*"
    r"|output_.*|return_.*"  # what is given back
    r"|_?att(entio)?n_implementation.*|_?(use_)?(sdpa|flash)_?att(entio)?n.*|.*attention_backend"  # how, not what
    r"|(use_)?(expert|tensor|pipeline|context|data|model|sequence)_(model_)?parallel.*|(use_)?parallel_embedding"
    r"|use_(cache.*|b?f(loat)?p?16|return_dict|liger.*|fused.*|unsloth.*|.*kernels?|compile|.*checkpointing|triton)"
    r"|use_(fast|.*tokenizer|auth.*|safetensors|reentrant)|.*_dtype|.*_in_fp32|chunk_size_feed_forward|prefill_chunk_size"
    r"|(n|num)_gpu_layers"
    r"|(top|min|typical)_[pkh]|temperature|.*_penalty|penalty_alpha|e(psilon|ta)_cutoff|guidance_scale"  # of sampling
    r"|max_time|(generation|sampling|assistant|watermarking|tokenizer|chat_template)(_.*)?"
    r"|(skip_)?special_tokens.*|(?!.*per_token)(.*_)?(tokens?|words)(_(ids?|index|map))?|.*_decoder_ids"
    r"|task_specific_params|sequence_bias"
    r"|(image|video|audio|vision|visual|mm|speech)_.*"  # what is seen and heard, which goes by its tensors
    r"|(.*_)?(versions?|date|licen[cs]e|metadata|path|paths|name|names|perplexity|accuracy)"  # what it is called
    r"|id2label|label2id|auto_map|sentence_transformers|transformers\.js.*|neuron.*|((model|num|n|total)_)?param(eter)?s.*"
    r"|quantization|quantization_config|compression_config"  # of formats, which go by tensors, too
    r"|ffn_dim_multiplier|(mlp|ffn)_(expansion_)?ratio|expansion_ratio|embed(ding)?_(size|dim)"  # sizes, which are
    r"|.*_position_embeddings|context_window(_size)?|hidden_act"  # there under the names that the family reads
    r"|max_window_layers"  # of use_sliding_window
    r"|(.*_)?mtp(_.*)?|.*_predict_layers"  # of what guesses, which changes no answer
)
"""Names of what changes no answer."""

_USUAL = {"layer_types": ("full_attention",), "position_embedding_type": ("rope",)}
"""Values that say what is so anyway."""


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
        if key in known or neutral_values(key) is not None or _is_idle(key) or _says_usual(key, value, fields):
            continue
        if _changes(key, value, _is_computed_with(key), inside=False):
            raise UnsupportedModelError(
                f"config.json: {key} is {shown(value)}, which tpctl does not know of {family.architecture}; left out, "
                "it could change every result. Correct model_type, or remove the field if it has no meaning"
            )


def _changes(key: str, value: Any, computes: bool, *, inside: bool) -> bool:
    """Whether a field could change a result: one with ``computes`` unless its value is neutral; another one by a
    number within a list or an object, or by one with a fraction, or by being switched on as what is used."""
    if isinstance(value, dict):
        inner = {name: one for name, one in value.items() if not _is_idle(name)}
        return any(_changes(name, one, computes or _is_computed_with(name), inside=True) for name, one in inner.items())
    if isinstance(value, list):
        return any(_changes(key, one, computes, inside=True) for one in value)
    if not value:
        return False
    if isinstance(value, bool):
        return computes or inside or key.lower().startswith("use_")
    if isinstance(value, str):
        return computes
    if computes or inside:
        return bool(value != 1 or not _words(key.lower()) & _AT_ONE)
    return isinstance(value, float) and value != 1


def _is_idle(key: str) -> bool:
    return _IDLE.fullmatch(key.lower()) is not None


def _says_usual(key: str, value: Any, fields: Fields) -> bool:
    if key in ("n_layer", "n_layers", "num_layers"):
        return bool(value == fields.get("num_hidden_layers"))
    return all(one in _USUAL.get(key, ()) for one in (value if isinstance(value, list) else [value]))


def _is_computed_with(key: str) -> bool:
    name = key.lower()
    return bool(_words(name) & _COMPUTES or _ROTATES.search(name))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name))
