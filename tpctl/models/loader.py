"""Fills a decoder from one rank's shard files, strictly: every parameter once, every stored tensor used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from tpctl.arch.held import HeldLinear
from tpctl.errors import OverflowedError, ShardFolderError, UnsupportedModelError
from tpctl.layers.weights.stored import orders
from tpctl.models.decoder import Decoder


def load_shard(
    model: Decoder, files: Iterable[Path], device: torch.device, skipped: Collection[str] = frozenset()
) -> int:
    """Give every parameter of ``model`` (built on the meta device) its tensor.

    On a CPU the tensors stay mapped files, so nothing is copied that is not converted or packed later.

    Args:
        files: this rank's safetensors files.
        skipped: names in them that are not read if the model has no such parameters: what another engine wants (``tpctl
            shard --compat``), and the predictor's, where nothing is predicted.

    Returns:
        How many bytes the parameters take.

    Raises:
        ShardFolderError: a tensor is missing, unknown, stored twice, or has another shape than the plan gives it,
            or holds no floats.
        UnsupportedModelError: no kernel of the device reads how experts are quantised.
        OverflowedError: a value is beyond the range of the dtype that the model is run in.
    """
    if device.type == "cuda":
        files = list(files)
        refuse_orders(model.held, files)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    kept = {held.name + kind for held in model.held for kind in held.kept}
    unread = {name for held in model.held for name in held.unread}
    if model.made_of.tied:  # the head's parameter serves both, by whichever name a shard has it
        del wanted[model.made_of.embedding]
    filled: set[str] = set()
    total, converted = 0, False
    for name, tensor in _read(files, device, {name for name in skipped if name not in wanted}):
        if model.made_of.tied and name == model.made_of.embedding:
            name = model.made_of.head
        parameter = wanted.get(name)
        if parameter is None and name in unread:
            continue
        if parameter is None:
            raise ShardFolderError(f"the shard holds {name}, which this model does not have; shard it again")
        if name in filled:
            raise ShardFolderError(f"the shard holds {name} twice; shard it again")
        if tensor.shape != parameter.shape:
            raise ShardFolderError(
                f"{name} is {list(tensor.shape)} in the shard but {list(parameter.shape)} by the plan; shard it again"
            )
        dtype = tensor.dtype if name in kept else parameter.dtype
        converted |= tensor.dtype != dtype
        _replace(model, name, tensor if name in kept else _converted(name, tensor, dtype))
        filled.add(name)
        total += tensor.numel() * dtype.itemsize
        del tensor
    if converted and device.type == "cuda":
        torch.cuda.empty_cache()  # what they were stored in is the KV cache's now
    if model.made_of.tied:
        model.tie()
    missing = sorted(wanted.keys() - filled)
    if missing:
        raise ShardFolderError(
            f"no shard file of this rank holds {missing[0]} ({len(missing)} missing); shard it again"
        )
    return total


def as_stored(model: Decoder, stored: Mapping[str, str]) -> None:
    """Give the codes of ``model``, which stays without weights, the dtypes that a shard has them in.

    Args:
        stored: of its tensors by name, as headers have them.
    """
    from tpctl.models.device_loader import STORED

    kept = {held.name + kind for held in model.held for kind in held.kept}
    for name, parameter in list(model.named_parameters()):
        if name in kept and name in stored:
            _replace(model, name, torch.empty_like(parameter, dtype=STORED[stored[name]]))


def refuse_orders(linears: Iterable[HeldLinear], files: Iterable[Path]) -> None:
    """Refuse, before weights are read, experts that kernels on GPUs do not read: of which gate and up have their inputs
    in different groups (GPTQ in order of activation, each by its own).

    Args:
        files: this rank's safetensors files.

    Raises:
        UnsupportedModelError: there are such ones; the message names them.
    """
    wanted = {}
    for linear in linears:
        order = linear.entry("order")
        if order is not None and linear.experts is not None:
            wanted[linear.name + order.name] = linear
    for path in files if wanted else ():
        with safe_open(path, framework="pt") as file:
            for name in sorted(wanted.keys() & set(file.keys())):
                if len(orders(wanted[name], file.get_tensor(name))) > 1:
                    raise UnsupportedModelError(
                        f"{name} has the inputs of experts' gate and up in different groups, which kernels on GPUs do "
                        "not read; use --device cpu, or the model in another format"
                    )


def _read(files: Iterable[Path], device: torch.device, skipped: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    if device.type == "cuda":
        from tpctl.models.device_loader import load_files

        tensors = load_files(files, device, skipped)
        while tensors:  # who converts one lets go of what was stored
            yield tensors.popitem()
        return
    for path in files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name not in skipped:
                    yield name, file.get_tensor(name)


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype``; what is infinite or no number in the shard stays so."""
    if not tensor.is_floating_point():
        raise ShardFolderError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} in the shard, but weights are floats; "
            "it is quantised, without scales; shard the unquantised original"
        )
    found = tensor.to(dtype)
    largest = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > largest and found.isinf().any():
        lost = tensor[found.isinf() & tensor.isfinite()]
        if lost.numel():
            value, title = float(lost[lost.abs().argmax()]), str(dtype).removeprefix("torch.")
            raise OverflowedError(
                f"{name} holds {value:g}, beyond the range of {title} (at most {largest:g}); "
                "use a --dtype of more range"
            )
    return found


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
