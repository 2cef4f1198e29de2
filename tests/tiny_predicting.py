"""Tiny random checkpoints with a layer that predicts one token more, and what it computes by its published formula.

transformers runs such layers of some families (``test_predictor_by_transformers.py``). Their block is a decoder layer
like any other, so for all of them it is taken from a model of transformers that has one layer more, and put where
checkpoints have it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import MIXTURES, SIZES, make_mixture

PREDICTING = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "glm4_moe", "deepseek_v3")
LAYERS: int = SIZES["num_hidden_layers"]
QWEN = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
DEEPSEEK = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


@dataclass
class Predicting:
    """A model of transformers' with one layer more, and the layer's own weights: of the norms and the projection."""

    model: Any
    weights: tuple[Tensor, ...]
    unit_offset: bool
    layers: int

    @torch.inference_mode()
    def states(self, ids: list[int]) -> Tensor:
        """[T, H]: the model's last states, normed; without the further layer."""
        inner = self.model.model
        found: dict[str, Tensor] = {}
        hook = inner.layers[self.layers].register_forward_pre_hook(
            lambda _, args, options: found.update(x=args[0] if args else options["hidden_states"]), with_kwargs=True
        )
        self.model(torch.tensor([ids]), use_cache=False)
        hook.remove()
        return inner.norm(found["x"])[0]

    @torch.inference_mode()
    def step(self, states: Tensor, following: list[int]) -> Tensor:
        """[T, H]: what the layer makes of the states of a sequence's first T tokens, each with the token behind it."""
        inner = self.model.model
        embedding, hidden, projection, last = self.weights
        joined = (self._norm(inner.embed_tokens(torch.tensor(following)), embedding), self._norm(states, hidden))
        found: dict[str, Tensor] = {}
        layer = inner.layers[self.layers]
        x = torch.cat(joined, -1) @ projection.T
        # The model as a whole knows its masks and rotary tables: only what enters and leaves the layer is taken.
        enter = layer.register_forward_pre_hook(lambda _, args, options: _entering(x, args, options), with_kwargs=True)
        leave = layer.register_forward_hook(
            lambda _, args, out: found.update(x=out[0] if isinstance(out, tuple) else out)
        )
        self.model(torch.tensor([following]), use_cache=False)
        enter.remove()
        leave.remove()
        return self._norm(found["x"].view(len(following), -1), last)

    @torch.inference_mode()
    def logits(self, made: Tensor) -> Tensor:
        return self.model.lm_head(made)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        scaled = x / (x.square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps).sqrt()
        return scaled * (1 + weight if self.unit_offset else weight)


def _entering(x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x.unsqueeze(0), *args[1:]), options
    return args, {**options, "hidden_states": x.unsqueeze(0)}


def make_copying(name: str, folder: Path, damp: float = 0.0, **changes: Any) -> None:
    """The same, of a model whose next token hangs on the last one, and on those before by as much as ``damp`` says; and
    whose further layer predicts from the token that it is given, by the same rule: with 0 it is always right."""
    make_predicting(name, folder, **changes)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    hidden = tensors["model.norm.weight"].numel()
    embedding, _, projection, last = _own(name, changes.get("num_hidden_layers", LAYERS))
    for one, x in tensors.items():
        if any(part in one for part in ("o_proj", "out_proj", "down_proj")):
            tensors[one] = x * damp
    tensors[projection] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), -1)
    tensors[embedding] = torch.full((hidden,), 0.0 if name.startswith("qwen") else 1.0)
    tensors[last] = tensors["model.norm.weight"].clone()
    save_file(tensors, path, {"format": "pt"})


def make_predicting(
    name: str, folder: Path, *, stacked: bool = False, copies: bool = True, **changes: Any
) -> Predicting:
    """Save a random float32 checkpoint of ``MIXTURES[name]`` with a further layer in ``folder``.

    Args:
        copies: as DeepSeek's have it, with a second copy of embedding and head there.
    """
    kinds = changes.get("layer_types") or MIXTURES[name][1].get("layer_types")
    layers = changes.get("num_hidden_layers", LAYERS)
    more: dict[str, Any] = {"num_hidden_layers": layers + 1}
    if kinds is not None:
        more["layer_types"] = [*kinds, "full_attention"]
    if "first_k_dense_replace" in MIXTURES[name][1]:
        more["num_nextn_predict_layers"] = 1
    model = make_mixture(name, folder, stacked=stacked, **{**changes, **more})
    raw = json.loads((folder / "config.json").read_text())
    raw["num_hidden_layers"] = layers
    if kinds is not None:
        raw["layer_types"] = list(kinds)
    (folder / "config.json").write_text(json.dumps(raw))
    qwen, hidden = name.startswith("qwen"), model.config.hidden_size
    names = _own(name, layers)
    weights = tuple(
        torch.randn(hidden, 2 * hidden) * 0.15
        if "fc" in one.split(".") or "eh_proj" in one.split(".")
        else torch.randn(hidden) * 0.3 + 0.5
        for one in names
    )
    tensors = load_file(folder / "model.safetensors")
    if qwen:
        at = f"model.layers.{layers}."
        tensors = {
            f"mtp.layers.0.{one.removeprefix(at)}" if one.startswith(at) else one: x for one, x in tensors.items()
        }
    elif copies:
        tensors[f"model.layers.{layers}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layers}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors |= dict(zip(names, weights, strict=True))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Predicting(model, weights, qwen, layers)


def _own(name: str, layers: int) -> tuple[str, ...]:
    """The layer's own weights, behind so many layers, as a checkpoint has them."""
    own = QWEN if name.startswith("qwen") else tuple(f"model.layers.{layers}.{one}" for one in DEEPSEEK)
    return tuple(f"{one}.weight" for one in own)
