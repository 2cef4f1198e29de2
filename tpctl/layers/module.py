"""The base of all layers."""

from __future__ import annotations

from typing import Any

from torch import nn


class Layer(nn.Module):
    """Called straight: torch's hooks, which nobody here sets, cost 2 µs a call, and a step has hundreds."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.forward(*args, **options)


def attach(root: nn.Module, name: str, part: nn.Module | nn.Parameter) -> tuple[nn.Module, str]:
    """Put ``part`` under a dotted ``name`` in ``root``, in modules that are made where there are none.

    Returns:
        The module that it is an attribute of, and its name there.
    """
    *outer, last = name.split(".")
    owner = root
    for one in outer:
        if one not in dict(owner.named_children()):
            owner.add_module(one, nn.Module())
        owner = owner.get_submodule(one)
    assert not hasattr(owner, last), f"{name} is there already"
    if isinstance(part, nn.Module):
        owner.add_module(last, part)
    else:
        owner.register_parameter(last, part)
    return owner, last
